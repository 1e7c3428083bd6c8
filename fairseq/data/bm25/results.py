"""Results of a search on disk: a killed search resumes, and reading checks everything.

A results folder holds ``shard<i>.json`` for each shard, an object of segment number (a string, as JSON wants) to the
list of its neighbours' numbers (integers), best first; and ``search.json``, which says what was searched and how.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.runtime.atomic_files import writing
from fairseq.runtime.files import read_json, write_json

logger = logging.getLogger(__name__)
Numbers = npt.NDArray[np.int32]

_SEARCH = "search.json"
_SHARD = re.compile(r"shard(\d+)\.json")


class ShardWriter:
    """The results of one shard; what was added is kept when the process is killed."""

    def __init__(self, folder: Path, shard_id: int, search: Mapping[str, Any]) -> None:
        """Go on with what is there of the same search.

        Raises: ValueError when the folder belongs to another search.
        """
        self.path = folder / f"shard{shard_id}.json"
        self._partial = folder / f"shard{shard_id}.partial"
        _claim(folder, search)
        self.complete = self.path.exists()
        self.num_done = 0 if self.complete else self._cut_torn_line()

    def _cut_torn_line(self) -> int:
        """Drop a line that a kill left unfinished; returns the number of whole ones."""
        if not self._partial.exists():
            return 0
        with open(self._partial, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)
        return content.count(b"\n")

    def add(self, rows: Sequence[tuple[int, list[int]]]) -> None:
        """Keep the neighbours of some segments."""
        with open(self._partial, "a", encoding="utf-8") as file:
            file.writelines(f'"{number}": {json.dumps(neighbors)}\n' for number, neighbors in rows)
        self.num_done += len(rows)

    def finish(self) -> None:
        """Turn what was added into the shard's file."""
        with writing(self.path) as file:
            file.write("{")
            for count, line in enumerate(_lines(self._partial)):
                file.write(("\n" if count == 0 else ",\n") + line)
            file.write("\n}\n")
        self._partial.unlink(missing_ok=True)
        self.complete = True


def _lines(path: Path) -> Iterator[str]:
    if path.exists():  # a shard of no segments has none
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def _claim(folder: Path, search: Mapping[str, Any]) -> None:
    """Write down whose folder it is. Raises: ValueError when it is another search's."""
    path = folder / _SEARCH
    if not path.exists():
        write_json(path, search)
        return
    before = read_json(path)
    for name in search:
        if before.get(name) != search[name]:
            raise ValueError(
                f"{str(folder)!r} holds results of another search ({name} was {before.get(name)!r}, is now "
                f"{search[name]!r}); give another --results_path or remove the folder"
            )


@dataclass(frozen=True)
class SegmentNeighbors:
    """The neighbours of all segments: those of segment i are ``ids[starts[i] : starts[i + 1]]``, best first."""

    ids: Numbers
    """int32, the lists one after another."""
    starts: npt.NDArray[np.int64]
    """(segments + 1,)"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, segment: int) -> list[int]:
        """The neighbours of a segment, best first."""
        found: list[int] = self.ids[self.starts[segment] : self.starts[segment + 1]].tolist()
        return found


def read_results(folder: Path) -> SegmentNeighbors:
    """Read all shards. Lists that name their own segment are freed of it.

    Raises: ValueError when segments are missing or there twice, when a neighbour is no segment, when there is none.
    """
    paths = shard_files(folder)
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no shard<i>.json; bm25_search.py writes them")
    own_lists = [_read_shard(path) for path in paths]
    segments = np.concatenate([numbers for numbers, _, _ in own_lists])
    lengths = np.concatenate([lengths for _, lengths, _ in own_lists])
    ids = np.concatenate([ids for _, _, ids in own_lists])
    _require_each_once(folder, segments)
    wrong = ids[(ids < 0) | (ids >= len(segments))]
    if len(wrong):
        raise ValueError(
            f"{str(folder)!r} names segment {wrong[0]} as a neighbour, but holds results of segments 0 to "
            f"{len(segments) - 1} only; run bm25_search.py for the shards that are missing"
        )
    return _in_order(segments, lengths, ids)


def shard_files(folder: Path) -> list[Path]:
    """The results that are complete."""
    return sorted(path for path in folder.glob("shard*.json") if _SHARD.fullmatch(path.name))


def _in_order(
    segments: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> SegmentNeighbors:
    owners = np.repeat(segments, lengths)
    kept = ids != owners
    if not kept.all():
        logger.warning("%d segments were found for themselves; those results are dropped", int((~kept).sum()))
    owners, ids = owners[kept], ids[kept]
    order = np.argsort(owners, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(segments)))])
    return SegmentNeighbors(ids[order].astype(np.int32), starts.astype(np.int64))


def _require_each_once(folder: Path, segments: npt.NDArray[np.int64]) -> None:
    expected = len(segments)
    if (folder / _SEARCH).exists():
        expected = int(read_json(folder / _SEARCH)["num_segments"])
    largest = max(expected, int(segments.max(initial=-1)) + 1)
    times = np.bincount(segments, minlength=largest)
    repeated, missing = np.flatnonzero(times > 1), np.flatnonzero(times == 0)
    if len(repeated):
        raise ValueError(
            f"{str(folder)!r} holds {len(repeated)} segments more than once ({_some(repeated)}); shards of different "
            "searches lie there: remove those of the other one"
        )
    if len(missing):
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} of {largest} segments ({_some(missing)}); run bm25_search.py for "
            "the shards that are missing"
        )


def _read_shard(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Segments, the lengths of their lists, and the lists one after another."""
    content = read_json(path)
    try:
        # The original program wrote neighbours as strings (and never found them again): read both.
        lists = [np.array(found, dtype=np.int64) for found in content.values()]
        segments = np.array(list(content), dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} holds something that is no segment number ({error})") from None
    if len(segments) and segments.min() < 0:
        raise ValueError(f"{path} holds segment {segments.min()}; they are counted from 0")
    lengths = np.array([len(found) for found in lists], dtype=np.int64)
    return segments, lengths, np.concatenate([*lists, np.empty(0, dtype=np.int64)])


def _some(numbers: npt.NDArray[np.int64]) -> str:
    return ", ".join(map(str, numbers[:3].tolist())) + (", ..." if len(numbers) > 3 else "")
