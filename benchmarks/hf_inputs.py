"""A model, a text and a store of the model's states with its index, for the benchmarks of Hugging Face models.

Keys and queries are of one model: where queries are far from all keys, their nearest lists are the longest ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import trained_gpt2

sys.path.insert(0, str(common.ROOT))

ROWS = 520_000
_QUERIES = 30_000
_BLOCK = 250  # rows of a sequence, which has a token more
_BATCH = 16
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Inputs:
    """What is measured."""

    name: str
    """The model in words."""
    model: Any
    ids: list[int]
    """Tokens of the text."""
    store: str
    """Folder of the store and its index."""


def parser(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name real inputs."""
    made.add_argument("--model", help="model with its tokenizer (default: GPT-2, 4 x 256, trained on Shakespeare)")
    made.add_argument("--text", help="text file (default: get_data.sh shakespeare's)")
    made.add_argument("--dstore-dir", help="folder of a store and its index (default: made of the text's beginning)")
    made.add_argument("--keep", default="output/hf", help="folder that keeps what is made between runs")
    made.add_argument("--train-seconds", type=float, default=85.0, help="how long the default model is trained")
    return made


def load(options: argparse.Namespace) -> Inputs:
    """The named inputs, or those in the folder ``--keep``, made where they are missing, which takes minutes.

    Raises: ValueError if a store is to be made and the text is too short.
    """
    folder = Path(options.keep)
    folder.mkdir(parents=True, exist_ok=True)
    name, model, ids = _named(options) if options.model else _default(folder, options.train_seconds)
    if options.dstore_dir:
        return Inputs(name, model, ids, str(options.dstore_dir))
    return Inputs(name, model, ids[ROWS:][:_QUERIES], _store(folder, model, ids))


def _named(options: argparse.Namespace) -> tuple[str, Any, list[int]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = Path(options.text or trained_gpt2.fetch("shakespeare", Path(options.keep)) / "train.txt")
    ids = AutoTokenizer.from_pretrained(options.model)(text.read_text(encoding="utf-8"))["input_ids"]
    return options.model, AutoModelForCausalLM.from_pretrained(options.model).eval(), ids


def _default(folder: Path, seconds: float) -> tuple[str, Any, list[int]]:
    """A GPT-2 that has been trained on the rows of the store, and the tokens of the text."""
    from transformers import GPT2LMHeadModel

    kept = folder / "gpt2"
    if not (kept / _COMPLETE).exists():
        ids = trained_gpt2.encode([trained_gpt2.fetch("shakespeare", folder) / "train.txt"])[: ROWS + _QUERIES]
        model, words = trained_gpt2.train(ids[:ROWS], 256, 4, 256, seconds)
        model.save_pretrained(kept)
        (kept / _COMPLETE).write_text(json.dumps({"model": words, "ids": ids}), encoding="utf-8")
    made = json.loads((kept / _COMPLETE).read_text(encoding="utf-8"))
    return made["model"], GPT2LMHeadModel.from_pretrained(kept).eval(), made["ids"]


def _store(folder: Path, model: Any, ids: list[int]) -> str:
    """The folder of a store of a model's states, with the tokens that follow."""
    import torch

    from fairseq.hf.hooks.identity import model_digest
    from fairseq.hf.knn.saver import KNNSaver

    kept = folder / f"store-{model_digest(model)[-12:]}"
    if (kept / _COMPLETE).exists():
        return str(kept)
    if len(ids) <= ROWS:
        raise ValueError(f"the text has {len(ids)} tokens, and a store of {ROWS} needs more; give a longer --text")
    saver = KNNSaver(dstore_dir=kept)
    with saver(model), torch.inference_mode():
        for first in range(0, ROWS, _BATCH * _BLOCK):
            starts = range(first, min(first + _BATCH * _BLOCK, ROWS), _BLOCK)
            ids_BT = torch.tensor([ids[start : start + _BLOCK + 1] for start in starts])
            model(input_ids=ids_BT, labels=ids_BT)
    saver.build_index(ncentroids=1024, code_size=64)
    (kept / _COMPLETE).write_text("{}", encoding="utf-8")
    return str(kept)
