"""Hidden states of real language models as keys and queries, computed once and kept in a folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import trained_gpt2

sys.path.insert(0, str(common.ROOT))

BLOCK = 512  # tokens that a model reads at once
_BATCH = 4
_QUERIES = 4096  # positions kept for queries, in whole blocks after the keys


@dataclass(frozen=True)
class KeySet:
    """Keys of a text and queries of the text that follows it; the inputs of the last feed-forward block."""

    name: str
    model: str
    """Model they are from, in words."""
    keys_MD: npt.NDArray[np.float16]
    query_ND: npt.NDArray[np.float16]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Options that name models and text, and the folder for what is computed."""
    parser.add_argument("--keys", default="output/peers", help="folder that keeps keys and queries between runs")
    parser.add_argument("--models", nargs="*", choices=("smollm2", "gpt2"), default=["smollm2", "gpt2"])
    parser.add_argument("--rows", type=int, default=65_536, help="number of keys")
    parser.add_argument("--queries", type=int, default=1024, help=f"number of queries, at most {_QUERIES}")
    parser.add_argument("--text", nargs="*", default=[], help="text files (default: get_data.sh shakespeare's)")
    parser.add_argument("--smollm2", help="folder of the model (default: get_data.sh smollm2's)")
    parser.add_argument("--gpt2", help="folder of a GPT-2 (default: 4 layers of width 1024, trained on the text)")
    parser.add_argument("--train-seconds", type=float, default=300.0, help="how long that GPT-2 is trained")


def load(name: str, options: argparse.Namespace) -> KeySet:
    """Keys and queries of a model, computed where the folder has too few.

    Raises: ValueError if the text is too short.
    """
    folder = Path(options.keys)
    files = [folder / f"{name}.npy", folder / f"{name}.queries.npy", folder / f"{name}.json"]
    if not all(file.exists() for file in files) or len(np.load(files[0], mmap_mode="r")) < options.rows:
        folder.mkdir(parents=True, exist_ok=True)
        _compute(name, options, folder)
    keys_MD, query_ND = (np.load(file, mmap_mode="r") for file in files[:2])
    if len(query_ND) < options.queries:
        raise ValueError(f"--queries {options.queries} exceeds the {len(query_ND)} in {files[1]}; give at most those")
    # Spread over the text: queries of one block are near to each other.
    step = len(query_ND) // options.queries
    return KeySet(
        name,
        json.loads(files[2].read_text(encoding="utf-8"))["model"],
        np.array(keys_MD[: options.rows]),
        np.array(query_ND[::step][: options.queries]),
    )


def _compute(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Run the model over the text and write the files of one set."""
    texts = [Path(text) for text in options.text] or [trained_gpt2.fetch("shakespeare", folder) / "train.txt"]
    if name == "smollm2":
        model, ids = _read(options.smollm2 or str(trained_gpt2.fetch("smollm2", folder)), texts)
        words = "SmolLM2-135M-Instruct, 4-bit blocks as float32"
    elif options.gpt2:
        model, ids = _read(options.gpt2, texts)
        words = f"GPT-2 of {Path(options.gpt2).name}"
    else:
        ids = trained_gpt2.encode(texts)
        model, words = trained_gpt2.train(ids, 1024, 16, BLOCK, options.train_seconds)
    blocks = -(-options.rows // BLOCK)
    needed = (blocks + _QUERIES // BLOCK) * BLOCK
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens for {name}, and {needed} are needed; give more with --text")
    keys_MD = _hidden_states(model, ids[: blocks * BLOCK])
    query_ND = _hidden_states(model, ids[blocks * BLOCK : needed])
    np.save(folder / f"{name}.npy", keys_MD[: options.rows])
    np.save(folder / f"{name}.queries.npy", query_ND)
    (folder / f"{name}.json").write_text(json.dumps({"model": words}), encoding="utf-8")


def _read(folder: str, texts: Sequence[Path]) -> tuple[Any, list[int]]:
    """A model and the tokens of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, [number for text in texts for number in tokenizer(text.read_text(encoding="utf-8"))["input_ids"]]


def _hidden_states(model: Any, ids: Sequence[int]) -> npt.NDArray[np.float16]:
    """The inputs of the last feed-forward block, one row for each token."""
    import torch

    from fairseq.hf.hooks.capture import capture_key
    from fairseq.hf.hooks.names import KeyType
    from fairseq.hf.hooks.taps import find_tap

    tap = find_tap(model, KeyType.last_ffn_input)
    ids_NT = torch.tensor(ids).view(-1, BLOCK)
    keys_MD = np.empty((len(ids), tap.dim), np.float16)
    with torch.inference_mode(), capture_key(tap) as capture:
        for first in range(0, len(ids_NT), _BATCH):
            ids_BT = ids_NT[first : first + _BATCH]
            model.base_model(input_ids=ids_BT, use_cache=False)
            rows = slice(first * BLOCK, first * BLOCK + ids_BT.numel())
            keys_MD[rows] = capture.take(len(ids_BT)).flatten(0, 1).half().numpy()
    return keys_MD
