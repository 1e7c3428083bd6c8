"""Subsets of a data set, and the files of a folder that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from script_arguments import TextArguments

from fairseq.registry import did_you_mean

_ALSO = {"valid": "validation", "dev": "validation"}


def subset_name(subset: str) -> str:
    """The name of a subset as this project has it."""
    return _ALSO.get(subset, subset)


def check_subset(subset: str, known: Iterable[str], verb: str = "known") -> None:
    """Raise ValueError when there is no such subset."""
    if subset not in known:
        raise ValueError(f"unknown --eval_subset {subset!r}{did_you_mean(subset, known)}; {verb}: {', '.join(known)}")


def dataset_folder(data: TextArguments) -> Path | None:
    """The folder that --dataset_name and its configuration mean; None when there is none of that name."""
    folder = Path(str(data.dataset_name))
    if data.dataset_config_name and (folder / data.dataset_config_name).is_dir():
        folder = folder / data.dataset_config_name
    return folder if folder.is_dir() else None


def files_in(folder: Path, subset: str) -> list[Path]:
    """The files of a folder whose names have the subset as a word."""
    names = {subset, *(short for short, name in _ALSO.items() if name == subset)}
    return [path for path in all_files(folder) if names & set(_words(path))]


def all_files(folder: Path) -> list[Path]:
    """The files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def _words(path: Path) -> list[str]:
    return path.name.replace("-", ".").replace("_", ".").split(".")
