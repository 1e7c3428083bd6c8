"""A GPT-2 of 4 layers of width 256, a text, and a store with its index, for the benchmarks of Hugging Face models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, VOCABULARY = 520_000, 8192


def parser(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name real inputs."""
    made.add_argument("--model", help="model with its tokenizer (default: GPT-2, 4 x 256, random)")
    made.add_argument("--text", help="text file to evaluate (default: random tokens)")
    made.add_argument("--dstore-dir", help="folder of a store and its index (default: made, which takes minutes)")
    return made


def model_and_ids(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """The model and the numbers of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        text = Path(options.text).read_text(encoding="utf-8")
        return model, AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    torch.manual_seed(0)
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    return model, torch.randint(1, VOCABULARY, (30_000,)).tolist()


def store(options: argparse.Namespace, model: Any, folder: Path) -> str:
    """The folder of the store: the named one, or one of random keys and tokens in as many clusters as real ones."""
    if options.dstore_dir:
        return str(options.dstore_dir)
    from fairseq.hf.knn.saver import KNNSaver

    rng = np.random.default_rng(0)
    saver = KNNSaver(dstore_dir=folder)
    with saver(model):
        centers = rng.standard_normal((2000, saver.tap.dim), dtype=np.float32)
        for _ in range(ROWS // 10_000):
            keys = centers[rng.integers(0, 2000, 10_000)] + 0.7 * rng.standard_normal((10_000, saver.tap.dim))
            ids = np.minimum(rng.zipf(1.2, 10_000), VOCABULARY) - 1
            saver.add(torch.from_numpy(keys.astype(np.float32))[None], torch.from_numpy(ids[None]))
    saver.build_index(ncentroids=1024, code_size=64)
    return str(folder)
