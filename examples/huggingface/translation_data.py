"""Pairs of sentences: read from files, and turned into tokens."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from script_data import all_files, check_subset, dataset_folder, files_in, subset_name
from translation_arguments import TranslationArguments, languages, parallel

from fairseq.hf.knn.batches import SentencePair

logger = logging.getLogger(__name__)

_LONGEST_SOURCE = 1024
_LONGEST_TARGET = 128


@dataclass(frozen=True)
class TextPair:
    """A source and its reference."""

    source: str
    target: str


def read_pairs(data: TranslationArguments, subset: str, most: int | None = None) -> list[TextPair]:
    """The pairs of a subset, at most so many. Raises: ValueError when there are none, or they are not in pairs."""
    pairs = list(itertools.islice(_pairs_of(data, subset_name(subset)), most))
    if not pairs:
        raise ValueError(f"the subset {subset} has no pairs of sentences")
    return pairs


def _pairs_of(data: TranslationArguments, subset: str) -> Iterator[TextPair]:
    if data.dataset_name is not None:
        return _from_folder(data, subset)
    check_subset(subset, data.files())
    given = data.files()[subset]
    if given is None:
        raise ValueError(f"the subset {subset} needs --{subset}_file")
    return _from_paths([Path(path) for path in data.paths(given)], data)


def _from_folder(data: TranslationArguments, subset: str) -> Iterator[TextPair]:
    folder = dataset_folder(data)
    if folder is None:
        raise ValueError(
            f"--dataset_name {data.dataset_name} is no local folder, and no data are downloaded; give a folder, or "
            "--train_file, --validation_file and --test_file"
        )
    if (folder / "dataset_dict.json").is_file() or any(folder.rglob("*.parquet")):
        return _from_datasets(folder, subset, data)
    found = files_in(folder, subset)
    if len(found) > 1 and data.source_lang and data.target_lang:
        both = [path.with_suffix("") for path in found]
        found = next((list(pair) for prefix in both if set(pair := parallel(prefix, data)) <= set(found)), found)
    is_pair = len(found) == 2 and found[0].stem == found[1].stem
    if len(found) != 1 and not is_pair:
        what = ", ".join(path.name for path in found or all_files(folder)) or "nothing"
        raise ValueError(
            f"{folder} should have {subset}.jsonl, or {subset}.{data.source_lang or 'SOURCE'} and "
            f"{subset}.{data.target_lang or 'TARGET'}; it has: {what}"
        )
    return _from_paths(found, data)


def _from_paths(paths: Sequence[Path], data: TranslationArguments) -> Iterator[TextPair]:
    if len(paths) == 2:
        return _parallel_lines(*paths)
    if paths[0].suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"{paths[0]} is not .jsonl; of parallel text give both files, separated by a comma, or their common prefix "
            "with --source_lang and --target_lang"
        )
    return _rows(_json_lines(paths[0]), str(paths[0]), data)


def _parallel_lines(source: Path, target: Path) -> Iterator[TextPair]:
    texts = [path.read_text(encoding="utf-8").removesuffix("\n") for path in (source, target)]
    sources, targets = ([line.rstrip("\r") for line in text.split("\n")] if text else [] for text in texts)
    if len(sources) != len(targets):
        raise ValueError(f"{source} has {len(sources)} lines, {target} {len(targets)}; they must be translations")
    return map(TextPair, sources, targets)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error}); it should have one object a line") from None


def _rows(rows: Iterable[dict[str, Any]], place: str, data: TranslationArguments) -> Iterator[TextPair]:
    wanted = [(flag, names) for flag, names in zip(("source", "target"), languages(data))]
    for number, row in enumerate(rows, 1):
        inner = row.get("translation", row) if isinstance(row, dict) else {}
        texts = []
        for side, names in wanted:
            name = next((name for name in (*names, side) if name in inner), None)
            if name is None:
                flag = f"--{side}_lang {names[0]}" if names else f"a column {side!r} (--{side}_lang is not given)"
                raise ValueError(f"{place}, pair {number}: no text of {flag}; it has: {', '.join(inner) or 'nothing'}")
            texts.append(str(inner[name]))
        yield TextPair(*texts)


def _from_datasets(folder: Path, subset: str, data: TranslationArguments) -> Iterator[TextPair]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"reading {folder} needs the package datasets: pip install 'fairseq-memory[hf]', or give .jsonl files"
        ) from None
    is_saved = (folder / "dataset_dict.json").is_file()
    found = datasets.load_from_disk(str(folder)) if is_saved else datasets.load_dataset(str(folder))
    check_subset(subset, found, "it has")
    return _rows(found[subset], str(folder), data)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a source and of a target, at most."""

    source: int
    target: int
    translation: int
    """Tokens of a translation that is searched for, with the one it starts from."""

    @classmethod
    def of(cls, data: TranslationArguments, generation_max_length: int | None, config: Any) -> Lengths:
        """What the user wants, or what the model reads. Raises: ValueError when it reads less than the user wants."""
        positions = getattr(config, "max_position_embeddings", None)
        wanted = {
            "max_source_length": (data.max_source_length, _LONGEST_SOURCE),
            "max_target_length": (data.max_target_length, _LONGEST_TARGET),
        }
        found = {}
        for name, (given, default) in wanted.items():
            if given is not None and positions is not None and given > positions:
                raise ValueError(f"--{name} {given} is more than the model's {positions} positions")
            found[name] = given or min(default, positions or default)
        translation = data.val_max_target_length or generation_max_length or found["max_target_length"]
        return cls(found["max_source_length"], found["max_target_length"], translation)


def encode(pairs: Sequence[TextPair], tokenizer: Any, prefix: str, lengths: Lengths) -> list[SentencePair]:
    """The tokens of pairs, with those that the tokenizer adds to a source and to a target."""
    sources = tokenizer([prefix + pair.source for pair in pairs], truncation=True, max_length=lengths.source)
    targets = tokenizer(text_target=[pair.target for pair in pairs], truncation=True, max_length=lengths.target)
    found = [
        SentencePair(torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64))
        for source, target in zip(sources["input_ids"], targets["input_ids"])
    ]
    for side, ids, most in (("source", sources, lengths.source), ("target", targets, lengths.target)):
        full = sum(len(each) == most for each in ids["input_ids"])
        if full:
            logger.warning("%d of %d texts fill --max_%s_length %d and may be cut", full, len(pairs), side, most)
    return found
