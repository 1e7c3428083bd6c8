"""Pairs of texts from a .jsonl file, tokenised into Arrow files, and read from there as a model takes them."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.hf.hooks.identity import tokenizer_digest
from fairseq.hf.knn.batches import SentencePair, Window
from fairseq.hf.pipeline.config import DataSection
from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import naming, replacing
from fairseq.runtime.files import locked, may_create_in, write_json
from fairseq.runtime.manifest import file_digest
from fairseq.runtime.records import OBJECT, TEXT, WHOLE, Fields, read_record

logger = logging.getLogger(__name__)

SUBSETS = ("train", "validation")
_ROWS_PER_FILE = 50_000
_LINES_AT_ONCE = 1_000
_FIX = "remove the folder and run generate.py again"
_RECORD = Fields({"signature": OBJECT, "digest": TEXT, "rows": WHOLE, "full": WHOLE})


@dataclass(frozen=True)
class TextPair:
    """An input and its output."""

    input: str
    output: str


def read_pairs(path: Path, data: DataSection) -> Iterator[TextPair]:
    """The pairs of a .jsonl file. Raises: ValueError with the line of what is none."""
    keys = (data.input_key, data.output_key)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); each line is an object") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: {json.dumps(row)[:40]} is not an object")
            for key in keys:
                if key not in row:
                    has = ", ".join(map(repr, row)) or "nothing"
                    raise ValueError(f"{path}:{number}: no {key!r}; it has {has} (data.input_key, data.output_key)")
                if not isinstance(row[key], str):
                    raise ValueError(f"{path}:{number}: {key!r} is {row[key]!r}, not a text")
                if not _is_unicode(row[key]):
                    raise ValueError(f"{path}:{number}: {key!r} holds half of a surrogate pair, which no file can hold")
            yield TextPair(*(row[key] for key in keys))


def _is_unicode(text: str) -> bool:
    """False for a text with an escape such as ``\\ud800`` alone, which JSON allows."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class PairEncoder:
    """Turns pairs into tokens for one model."""

    def __init__(self, tokenizer: Any, config: Any, data: DataSection) -> None:
        """Raises: ValueError when the lengths do not fit the model, or the tokenizer ends no text."""
        self.tokenizer, self.data = tokenizer, data
        self.has_encoder = bool(config.is_encoder_decoder)
        lengths = (data.max_input_length, data.max_output_length)
        needed = max(lengths) if self.has_encoder else sum(lengths)
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and needed > positions:
            both = "and" if self.has_encoder else "plus"
            raise ValueError(
                f"data.max_input_length {lengths[0]} {both} data.max_output_length {lengths[1]} do not fit the model's "
                f"{positions} positions; make them smaller"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no token that ends a text (eos_token)")

    def signature(self, path: Path) -> dict[str, Any]:
        """What the tokens of a file follow from."""
        data, kind = self.data, type(self.tokenizer).__name__
        return {
            "file": file_digest(path),
            "keys": [data.input_key, data.output_key],
            "templates": [data.input_template, data.output_template],
            "lengths": [data.max_input_length, data.max_output_length],
            "tokenizer": f"{kind} {tokenizer_digest(self.tokenizer)}",
            "model": "encoder-decoder" if self.has_encoder else "decoder",
        }

    def encode(self, pairs: list[TextPair]) -> tuple[list[list[int]], list[list[int]], int]:
        """Tokens of inputs and of outputs, and how many texts were cut, or have as many tokens as a cut one.

        An encoder reads inputs with the tokenizer's special tokens, and so it writes outputs. A decoder reads an input
        from its beginning on, cut on the left, and the output after it, which ends with the end of a text.
        """
        inputs = [self.data.input_template.replace("{input}", pair.input) for pair in pairs]
        outputs = [self.data.output_template.replace("{output}", pair.output) for pair in pairs]
        longest, longest_output = self.data.max_input_length, self.data.max_output_length
        quiet: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
        eos = self.tokenizer.eos_token_id
        if self.has_encoder:
            input_ids = self.tokenizer(inputs, truncation=True, max_length=longest, **quiet)["input_ids"]
            output_ids = self.tokenizer(text_target=outputs, truncation=True, max_length=longest_output, **quiet)
            # Some tokenizers make nothing of an empty text.
            input_ids, output_ids = ([ids or [eos] for ids in each] for each in (input_ids, output_ids["input_ids"]))
        else:
            input_ids = [(ids or [eos])[-longest:] for ids in self.tokenizer(inputs, **quiet)["input_ids"]]
            output_ids = self.tokenizer(outputs, add_special_tokens=False, **quiet)["input_ids"]
            output_ids = [[*ids[: longest_output - 1], eos] for ids in output_ids]
        full = sum(len(ids) >= longest for ids in input_ids) + sum(len(ids) >= longest_output for ids in output_ids)
        return input_ids, output_ids, full


@dataclass(frozen=True)
class WrittenPairs:
    """A tokenised subset."""

    rows: int
    full: int
    """Texts with as many tokens as the config allows: cut, or of just that length."""
    was_complete: bool


def count_pairs(path: Path, data: DataSection) -> int:
    """Read a whole file. Raises: ValueError as ``read_pairs``, and for a file that is missing or has no pairs."""
    if not path.is_file():
        raise ValueError(f"no such file: {path} (data.train_path, data.val_path)")
    rows = sum(1 for _ in read_pairs(path, data))
    if not rows:
        raise ValueError(f"{path} has no pairs")
    return rows


def write_pairs(encoder: PairEncoder, path: Path, folder: Path, rows: int) -> WrittenPairs:
    """Tokenise the pairs of a file, which has so many, into a folder; an interrupted run is resumed."""
    signature = encoder.signature(path)
    may_create_in(folder.parent)
    with locked(folder.with_name(f"{folder.name}.lock"), f"the data set {str(folder)!r}"):
        record, progress = folder / "dataset.json", folder / "unfinished.json"
        if record.exists():
            done = read_record(record, _RECORD, _FIX)
            if done["signature"] == signature:
                progress.unlink(missing_ok=True)
                return WrittenPairs(done["rows"], done["full"], True)
            shutil.rmtree(folder)
        if not progress.exists() or read_record(progress, Fields({"signature": OBJECT}))["signature"] != signature:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_json(progress, {"signature": signature})
        pairs, full = read_pairs(path, encoder.data), 0
        for number in range(-(-rows // _ROWS_PER_FILE)):
            full += _write_file(encoder, list(itertools.islice(pairs, _ROWS_PER_FILE)), _file(folder, number))
            logger.info("%s: %d of %d pairs", folder, min(rows, (number + 1) * _ROWS_PER_FILE), rows)
        digest = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()
        write_json(record, {"signature": signature, "digest": digest, "rows": rows, "full": full})
        progress.unlink()
    return WrittenPairs(rows, full, False)


def _file(folder: Path, number: int) -> Path:
    return folder / f"data-{number:05d}.arrow"


def _write_file(encoder: PairEncoder, pairs: list[TextPair], path: Path) -> int:
    """Write an Arrow file, unless an interrupted run did; returns how many texts are full."""
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    numbers, text = pa.list_(pa.int32()), pa.string()
    fields = [("input", text), ("output", text), ("input_ids", numbers), ("output_ids", numbers), ("full", pa.int32())]
    if path.exists():
        return int(np.sum(_open_file(path).with_format("numpy")["full"][:]))
    total = 0
    with replacing(path) as temporary, naming(temporary):
        writer = ArrowWriter(path=temporary, schema=pa.schema(fields))
        for first in range(0, len(pairs), _LINES_AT_ONCE):
            some = pairs[first : first + _LINES_AT_ONCE]
            input_ids, output_ids, full = encoder.encode(some)
            texts = {"input": [pair.input for pair in some], "output": [pair.output for pair in some]}
            counts = [full] + [0] * (len(some) - 1)
            writer.write_batch({**texts, "input_ids": input_ids, "output_ids": output_ids, "full": counts})
            total += full
        writer.finalize()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    return total


def _open_file(path: Path) -> Any:
    import datasets

    try:
        with naming(path):
            return datasets.Dataset.from_file(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_FIX}") from None


class Pairs:
    """Tokenised pairs, mapped from disk."""

    def __init__(self, folder: Path, rows: int, digest: str, *, has_encoder: bool) -> None:
        """Raises: ValueError when files are missing or of another number of pairs."""
        import datasets
        import pyarrow.compute as pc

        files = sorted(folder.glob("data-*.arrow"))
        if not files:
            raise ValueError(f"{folder} has no Arrow files; {_FIX}")
        self._dataset = datasets.concatenate_datasets([_open_file(path) for path in files])
        if len(self._dataset) != rows:
            raise ValueError(f"{folder} holds {len(self._dataset)} pairs, its record says {rows}; {_FIX}")
        self.digest, self.has_encoder = digest, has_encoder
        lengths = pc.list_value_length(self._dataset.data.column("output_ids"))
        self.lengths: Array = lengths.to_numpy().astype(np.int64)
        """Tokens of each output: all are scored, trained on and saved."""

    def __len__(self) -> int:
        return len(self.lengths)

    def texts(self, number: int) -> TextPair:
        """The texts of a pair."""
        row = self._dataset[int(number)]
        return TextPair(row["input"], row["output"])

    def input_ids(self, number: int) -> torch.Tensor:
        """The tokens of an input, int64."""
        return torch.tensor(self._dataset[int(number)]["input_ids"])

    def piece(self, number: int) -> Window | SentencePair:
        """A pair as a model reads it: what counts is the output."""
        row = self._dataset[int(number)]
        input_ids, output_ids = (torch.tensor(row[name]) for name in ("input_ids", "output_ids"))
        if self.has_encoder:
            return SentencePair(input_ids, output_ids)
        return Window(torch.cat([input_ids, output_ids]), len(input_ids))


def open_pairs(encoder: PairEncoder, subset: str) -> Pairs:
    """The tokenised pairs of a subset.

    Raises: ValueError when generate.py has not made them, or of another file, tokenizer or setting.
    """
    data, folder = encoder.data, Path(encoder.data.dataset_dir) / subset
    record = folder / "dataset.json"
    if not record.exists():
        raise ValueError(f"{folder} holds no finished data set; run generate.py")
    made = read_record(record, _RECORD, _FIX)
    path = Path(data.train_path if subset == "train" else data.val_path)
    wanted = encoder.signature(path) if path.exists() else dict(made["signature"])
    changed = _first_difference(made["signature"], wanted)
    if changed is not None:
        raise ValueError(f"{folder} was made with {changed}; run generate.py again")
    return Pairs(folder, made["rows"], made["digest"], has_encoder=encoder.has_encoder)


def _first_difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    name = next((name for name in wanted if made.get(name) != wanted[name]), None)
    return None if name is None else f"{name} {made.get(name)!r}, now it is {wanted[name]!r}"
