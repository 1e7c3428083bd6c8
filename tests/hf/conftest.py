"""A tiny GPT-2 with a tokenizer of its own, and the scripts of examples/huggingface as modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "huggingface"


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the examples, from which their modules can be imported."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return EXAMPLES


@pytest.fixture(scope="session")
def tiny_gpt2(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of 32 positions, whose tokenizer knows the words of the corpus and the newline."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = sorted(set((corpus / "train.txt").read_text().split()))
    vocabulary = {token: number for number, token in enumerate(["<unk>", "\n", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    core.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<unk>")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("tiny") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def clm(examples: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run run_clm.py in this process, into ``tmp_path/out``; returns what it printed."""
    import run_clm

    def run(*words: object) -> str:
        where = [
            "--model_name_or_path",
            tiny_gpt2,
            "--output_dir",
            tmp_path / "out",
            "--use_cpu",
            "--disable_tqdm",
            "1",
        ]
        given = [str(word) for word in words]
        run_clm.main([*(str(word) for word in where if "--config_name" not in given), *given])
        return capsys.readouterr().out

    return run
