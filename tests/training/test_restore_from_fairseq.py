"""Training that starts from a checkpoint of fairseq 0.12, whose --arch transformer_lm is post-norm."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint
from fairseq.data.dictionary import Dictionary
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_cli import train

SMALL: dict[str, Any] = {
    "decoder_embed_dim": 8,
    "decoder_input_dim": 8,
    "decoder_output_dim": 8,
    "decoder_ffn_embed_dim": 12,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
}


@pytest.fixture
def post_norm(data_bin: Path, tmp_path: Path) -> Path:
    """A checkpoint as fairseq 0.12 writes it."""
    size = len(Dictionary.load(data_bin / "dict.txt"))
    config = TransformerLMConfig(**SMALL, decoder_normalize_before=False, max_target_positions=16)
    model = TransformerLanguageModel.build(config, size, 1)
    settings = SMALL | {"_name": "transformer_lm", "decoder_normalize_before": False, "tokens_per_sample": 16}
    content = {
        "args": None,
        "cfg": {"task": {"_name": "language_modeling", "tokens_per_sample": 16}, "model": settings},
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 5}],
    }
    torch.save(content, tmp_path / "fairseq.pt")
    return tmp_path / "fairseq.pt"


def run(data: Path, save_dir: Path, *words: object) -> dict[str, Any]:
    """Train one update with a rate of 0; returns the checkpoint that it leaves."""
    base = "--optimizer sgd --lr 0 --max-update 1 --max-tokens 64 --tokens-per-sample 16 --cpu --no-progress-bar"
    train.main([str(data), "--save-dir", str(save_dir), *base.split(), "--disable-validation", *map(str, words)])
    found = load_checkpoint(str(save_dir / "checkpoint_last.pt"))
    return {"config": found.config["model"], "model": found.model}


def test_the_architecture_is_that_of_the_file(data_bin, post_norm, tmp_path, caplog):
    caplog.set_level("INFO")
    left = run(data_bin, tmp_path / "out", "--arch", "transformer_lm", "--restore-file", post_norm)
    assert left["config"]["decoder_normalize_before"] is False
    for name, value in load_checkpoint(str(post_norm)).model.items():
        assert torch.equal(left["model"][name], value), name
    assert "decoder_normalize_before False" in caplog.text
    assert "decoder_embed_dim 8" in caplog.text


def test_negative_flags_say_the_same(data_bin, post_norm, tmp_path):
    size = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), value)]
    left = run(data_bin, tmp_path / "new", "--no-decoder-normalize-before", *size)
    assert left["config"]["decoder_normalize_before"] is False
    left = run(data_bin, tmp_path / "out", "--no-decoder-normalize-before", *size, "--restore-file", post_norm)
    assert "decoder.layer_norm.weight" not in left["model"]


def test_a_flag_that_contradicts_the_file_is_an_error(data_bin, post_norm, tmp_path):
    for words in (("--decoder-normalize-before",), ("--arch", "transformer_lm_gpt2_tiny")):
        with pytest.raises(ValueError, match="it is another architecture"):
            run(data_bin, tmp_path / "out", *words, "--restore-file", post_norm)
