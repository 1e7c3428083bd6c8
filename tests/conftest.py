"""A tiny corpus, binarised once, and ways to run the project's commands as a user does."""

from __future__ import annotations

import gc
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from explorer_fixtures import explored, explored_pairs, explored_store, explored_words, kept  # noqa: F401
from forked_commands import Forks

# The time an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A million objects of imported modules are looked through by every full collection; they all stay.
gc.set_threshold(20_000, 20, 50)

ROOT = Path(__file__).resolve().parents[1]

Command = Callable[..., subprocess.CompletedProcess[str]]

TINY_MODEL = (
    "--arch transformer_lm_wiki103 --decoder-layers 2 --decoder-embed-dim 16 --decoder-input-dim 16 "
    "--decoder-output-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --adaptive-input-cutoff 20,40 "
    "--adaptive-softmax-cutoff 20,40 --dropout 0.1 --attention-dropout 0 --activation-dropout 0 "
    "--adaptive-softmax-dropout 0 --criterion adaptive_loss --optimizer adam --lr 0.01 --lr-scheduler inverse_sqrt "
    "--warmup-updates 4 --tokens-per-sample 32 --max-tokens 128 --sample-break-mode none --cpu --no-progress-bar "
    "--log-interval 5 --num-workers 0"
).split()


def write_corpus(path: Path, num_lines: int, seed: int) -> None:
    """Lines of a small language: a word is usually followed by one of two others, so that there is much to learn."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_lines):
        word, words = int(rng.integers(70)), []
        for _ in range(int(rng.integers(1, 20))):
            words.append(f"w{word}")
            likely = (word * 3 + int(rng.integers(2))) % 70
            word = likely if rng.random() < 0.85 else int(rng.integers(70))
        lines.append(" ".join(words))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.txt, valid.txt, test.txt."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (name, lines) in enumerate((("train", 300), ("valid", 60), ("test", 50))):
        write_corpus(folder / f"{name}.txt", lines, seed)
    return folder


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """What earlier tests left is passed over by collections: each takes a second otherwise, late in a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts scripts as processes that need not import PyTorch any more."""
    held = Forks()
    yield held
    held.close()


@pytest.fixture(scope="session")
def command(forks: Forks) -> Command:
    """Run one of the top-level scripts; fails the test on a non-zero exit unless ``expect`` says otherwise."""

    def run(script: str, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = forks.start(script, *words)
        code = done.wait()
        assert code == expect, f"exit {code}\n{done.out[-2000:]}\n{done.err[-3000:]}"
        return subprocess.CompletedProcess([script, *map(str, words)], expect, done.out, done.err)

    return run


@pytest.fixture
def two_ranks(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command as torchrun starts its two processes; returns what both said if it was to fail."""

    def run(*words: object, expect: int = 0) -> str:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = []
        for rank in range(2):
            for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items():
                monkeypatch.setenv(name, str(value))
            started.append(forks.start("train.py", *words))
        for name in (*shared, "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
        codes = [process.wait() for process in started]
        said = "\n".join(process.err for process in started)
        assert codes == [expect] * 2, said[-4000:]
        return said

    return run


@pytest.fixture(scope="session")
def data_bin(corpus: Path, command: Command) -> Path:
    """The corpus, binarised by preprocess.py."""
    prefixes = [f"--{name}pref={corpus / name}.txt" for name in ("train", "valid", "test")]
    command("preprocess.py", "--only-source", *prefixes, "--destdir", corpus / "data-bin")
    return corpus / "data-bin"


@pytest.fixture(scope="session")
def trained(data_bin: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model trained for four epochs."""
    folder = tmp_path_factory.mktemp("trained")
    command("train.py", data_bin, "--save-dir", folder, "--max-epoch", "4", *TINY_MODEL)
    return folder


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the examples for Hugging Face models, from which their modules can be imported."""
    folder = ROOT / "examples" / "huggingface"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of 32 positions, whose tokenizer knows the words of the corpus and the newline."""
    transformers = pytest.importorskip("transformers")
    import torch
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
        given = [str(word) for word in words]
        model = [] if "--config_name" in given else ["--model_name_or_path", str(tiny_gpt2)]
        run_clm.main([*model, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "1", *given])
        return capsys.readouterr().out

    return run


def set_fast_products(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Take the ways of a processor whose fastest products are these; of missing instructions, what stands for them."""
    from fairseq.memory.index.ops import products, tile_loop_kernels

    kinds = tile_loop_kernels.INSTRUCTIONS
    if name in kinds and name not in products.available():
        monkeypatch.setitem(kinds, name, tile_loop_kernels.without_instructions(kinds[name]))
    monkeypatch.setattr(products, "chosen", lambda: products.by_name(name))


PRODUCTS = ["amx_int8", "avx512_vnni", "avx2", "asimddp", "library_int8", "bfloat16", "float32"]
"""Ways to multiply that differ in what they round to, and how; each is taken on any machine."""


@pytest.fixture(params=PRODUCTS)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kind of processor in turn; the way in which it multiplies fastest."""
    set_fast_products(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, and more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def no_grad() -> Iterator[None]:
    """No gradients for a module's tests and fixtures."""
    import torch

    with torch.no_grad():
        yield


def perplexity(output: str) -> float:
    """What the report's second line says."""
    found = re.search(r"^Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)$", output, re.MULTILINE)
    assert found, output
    return float(found.group(2))


@pytest.fixture(scope="session")
def llama() -> Any:
    """A tiny random Llama whose generations are as long as they are asked to be."""
    import served_models
    import tiny_models

    return served_models.endless(tiny_models.make("llama"))


@pytest.fixture(scope="session")
def llama_stores(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its stores ``a`` and ``b``, of other texts."""
    import served_models
    from tiny_stores import saved

    folder = tmp_path_factory.mktemp("stores")
    saved(llama, folder, name="a", tokenizer=served_models.tokenizer())
    saved(llama, folder, name="b", batches=2, tokenizer=served_models.tokenizer())
    return folder


@pytest.fixture(scope="module")
def served(llama: Any, llama_stores: Path) -> Iterator[Any]:
    """A server with both, the first the default, with k 8, weight 0.4 and temperature 2."""
    import served_models

    stores = (f"a={llama_stores}/a", f"b={llama_stores}/b")
    tokenizer = served_models.tokenizer(served_models.TEMPLATE)
    with served_models.serving(llama, tokenizer, store=stores, k=8, weight=0.4, knn_temp=2.0) as running:
        yield running
