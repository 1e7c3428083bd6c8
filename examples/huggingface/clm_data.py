"""Text to tokens to windows: lines in groups, each group one text."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from clm_arguments import DataArguments
from script_data import all_files, check_subset, dataset_folder, files_in, subset_name
from torch import Tensor

from fairseq.hf.knn.batches import Window, windows_of

logger = logging.getLogger(__name__)

_LARGEST_BLOCK = 1024  # where a model reads more, longer windows cost more than they gain, as in Hugging Face's script


def read_lines(data: DataArguments, subset: str) -> Iterable[str]:
    """The lines of a subset. Raises: ValueError when there is no such text."""
    subset = subset_name(subset)
    if data.dataset_name is None:
        return _from_files(data, subset)
    folder = dataset_folder(data)
    if folder is not None:
        return _lines_of(_file_in(folder, subset), data.keep_linebreaks)
    return _from_hub(data, subset)


def _from_files(data: DataArguments, subset: str) -> Iterable[str]:
    files = data.files()
    check_subset(subset, files)
    path = files[subset]
    if path is not None:
        return _lines_of(Path(path), data.keep_linebreaks)
    if subset == "test" or data.train_file is None:
        raise ValueError(f"the subset {subset} needs --{subset}_file")
    return _held_out(data)


def train_lines(data: DataArguments) -> Iterable[str]:
    """The lines to train on: without those that are held out, where train has to give the validation text as well."""
    lines = read_lines(data, "train")
    if data.dataset_name is None and data.validation_file is None:
        lines = list(lines)
        return lines[_num_held_out(len(lines), data) :]
    return lines


def _held_out(data: DataArguments) -> list[str]:
    lines = list(_lines_of(Path(str(data.train_file)), data.keep_linebreaks))
    count = _num_held_out(len(lines), data)
    logger.info("no --validation_file: the first %d of %d training lines are the validation text", count, len(lines))
    return lines[:count]


def _num_held_out(num_lines: int, data: DataArguments) -> int:
    return max(1, num_lines * data.validation_split_percentage // 100)


def _file_in(folder: Path, subset: str) -> Path:
    """The one file of a folder whose name has the subset as a word."""
    found = files_in(folder, subset)
    if len(found) != 1:
        what = ", ".join(path.name for path in found or all_files(folder)) or "nothing"
        raise ValueError(
            f"{folder} should have one text file of the subset {subset!r}, {subset}.txt say; it has: {what}"
        )
    return found[0]


def _lines_of(path: Path, keep_linebreaks: bool) -> Iterator[str]:
    """Lines of a text file, or the texts of a .jsonl or .csv file (column text, or the first one)."""
    with path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".csv":
            rows: Iterator[dict[str, Any]] = csv.DictReader(file)
        elif path.suffix in (".json", ".jsonl"):
            rows = (json.loads(line) for line in file if line.strip())
        else:
            yield from file if keep_linebreaks else (line.rstrip("\n") for line in file)
            return
        for row in rows:
            yield str(row.get("text", next(iter(row.values()))))


def _from_hub(data: DataArguments, subset: str) -> Iterable[str]:
    name = str(data.dataset_name)
    instead = "or give a local folder, or --train_file, --validation_file and --test_file"
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--dataset_name {name} is no local folder, and to get it from the hub needs the package datasets: pip "
            f"install 'fairseq-memory[hf]', {instead}"
        ) from None
    try:
        found = datasets.load_dataset(name, data.dataset_config_name)
    except (OSError, ValueError, RuntimeError) as error:  # no network, or no such data set
        raise ValueError(f"--dataset_name {name} is no local folder and cannot be had ({error}); {instead}") from error
    check_subset(subset, found, "it has")
    table = found[subset]
    column = "text" if "text" in table.column_names else table.column_names[0]
    return (row[column] for row in table)


def tokenize(lines: Iterable[str], tokenizer: Any, lines_per_group: int) -> list[Tensor]:
    """Tokens of each group of lines, int32. Raises: ValueError when there are none."""
    groups, waiting = [], iter(lines)
    while group := list(itertools.islice(waiting, lines_per_group)):
        ids = tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]
        groups.append(torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int32))
    if sum(map(len, groups)) < 2:
        raise ValueError("the text has fewer than two tokens, so there is nothing to predict")
    return groups


def window_size(block_size: int | None, config: Any, tokenizer: Any) -> int:
    """Tokens a model reads at once. Raises: ValueError when the user wants more than it can."""
    text_config = config.get_text_config(decoder=True)
    limits = (getattr(text_config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    most = limits[0] or limits[1] or _LARGEST_BLOCK
    if block_size is None:
        return int(min(most, _LARGEST_BLOCK))
    if block_size > most:
        raise ValueError(f"--block_size {block_size} is more than the model's {most} positions; give {most} or less")
    return block_size


def window_stride(data: DataArguments, size: int, *, saving: bool) -> int:
    """Tokens from one window's start to the next. Raises: ValueError when tokens would be left out."""
    stride = data.stride or (size if saving else max(1, size // 2))
    if stride > size:
        raise ValueError(f"--stride {stride} is more than the window's {size} tokens: some would never be read")
    return stride


def windows(groups: Iterable[Tensor], size: int, stride: int, data: DataArguments) -> Iterator[Window]:
    """The windows of all groups, at most ``max_eval_samples``."""
    every = (window for ids in groups for window in windows_of(ids, size, stride, tail=not data.drop_group_tails))
    return itertools.islice(every, data.max_eval_samples)
