"""Tiny models, pairs and overrides for examples/pipeline, and comparisons of what its runs wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fairseq.hf.pipeline.config import PipelineConfig, read_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "pipeline"
SPECIAL = ["<pad>", "</s>", "<unk>"]


def pairs(num: int, seed: int) -> list[tuple[str, str]]:
    """Words and the same words of another language, the last one first."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(12, size=rng.integers(1, 7)) for _ in range(num)]
    return [(" ".join(f"e{n}" for n in words), " ".join(f"r{n}" for n in words[::-1])) for words in drawn]


def write_jsonl(path: Path, lines: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"input": one, "output": other}) + "\n" for one, other in lines))


def write_material(folder: Path) -> None:
    """Write pairs and models without dropout."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    train = pairs(50, 0)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "val.jsonl", [*train[3:12], *pairs(6, 1)])
    words = [f"{language}{n}" for language in "er" for n in range(12)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    for name in ("t5", "gpt2"):
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if name == "t5":
            core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": 1}
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        sizes |= {"dropout_rate": 0.0, "initializer_factor": 1.5}
        if name == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
            sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.AutoConfig.for_model(name, vocab_size=len(vocabulary), **ids, **sizes)
        kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
        torch.manual_seed(3)
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def words_for(material: Path, folder: Path, model: str = "t5") -> list[str]:
    """Overrides of main.yaml for a tiny run into a folder."""
    return [
        f"folder={folder}",
        f"data.train_path={material}/train.jsonl",
        f"data.val_path={material}/val.jsonl",
        f"model.name={material}/{model}",
        "data.train_batch_size=6",
        "data.eval_batch_size=4",
        "data.max_input_length=12",
        "data.max_output_length=9",
        "training.num_epochs=4",
        "training.warmup_steps=3",
        "training.gradient_accumulation_steps=2",
        "training.save_interval=6",
        "training.max_num_checkpoints=3",
        "training.eval_iters=2",
        "training.log_interval=1",
        "knn.k=8",
        "knn.index=flat",
        "knn.key_dtype=float32",
        "fabric.accelerator=cpu",
        "evaluation.metrics=[exact_match,bleu]",
    ]


def configured(words: list[str]) -> PipelineConfig:
    return read_config(words, FOLDER / "configs" / "main.yaml")


def files_of(folder: Path) -> dict[str, str]:
    """Digest of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_seconds(files: dict[str, str]) -> dict[str, str]:
    """All but the metadata of an index, which has seconds in it."""
    return {name: digest for name, digest in files.items() if not name.endswith(".l2.json")}


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "model" / "log.jsonl").open()]


def require_same_training(one: Path, other: Path, *, exact: bool = False) -> None:
    """Compare losses of all steps, and weights, moments and settings at the end."""
    logs, limit = [log_of(folder) for folder in (one, other)], 0.0 if exact else 1e-5
    assert len(logs[0]) == len(logs[1]) == 20 + 4, "steps and validations"
    for entries in zip(*logs):
        assert entries[0] == pytest.approx(entries[1], abs=limit)
    last = [folder / "model" / "step-00000020" for folder in (one, other)]
    weights = [load_file(path / "model.safetensors") for path in last]
    for name, value in (entry for every in weights for entry in every.items()):
        if name.endswith("c_attn.bias"):  # that of keys changes no probability: its gradient is nothing but rounding
            value.view(3, -1)[1].zero_()
    states = [torch.load(path / "training.ckpt", weights_only=True) for path in last]
    assert states[0].keys() == states[1].keys() == {"state", "param_groups"}
    assert states[0]["param_groups"][0]["params"] == states[1]["param_groups"][0]["params"]
    torch.testing.assert_close(*weights, rtol=0, atol=limit)
    torch.testing.assert_close(*(state["state"] for state in states), rtol=0, atol=limit)
    assert (last[0] / "config.json").read_text() == (last[1] / "config.json").read_text()


def words_of(strategy: str) -> list[str]:
    """Overrides for a strategy; the stage of ZeRO is a key of its own."""
    name, _, stage = strategy.partition("_stage_")
    return [f"fabric.strategy={name}", *([f"deepspeed.zero_optimization.stage={stage}"] if stage else [])]


def resumed_words(base: Path, start: Path, folder: Path, *words: str) -> list[str]:
    """Words for a run that resumes another one's twelfth step; ``base`` has the data."""
    shutil.copytree(start / "model" / "step-00000012", folder / "model" / "step-00000012")
    shutil.copy(start / "model" / "log.jsonl", folder / "model")
    return [*words, f"folder={folder}", f"data.dataset_dir={base}/dataset"]
