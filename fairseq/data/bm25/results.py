"""Results of a search on disk: an interrupted search resumes, and reading validates everything.

A results folder holds ``shard<i>.json`` for each shard, which maps a segment number (a string, as JSON requires) to the
list of its neighbours' numbers (integers), best first; and ``search.json``, the settings of the search.
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
from fairseq.runtime.records import WHOLE, Fields, read_record

logger = logging.getLogger(__name__)
Numbers = npt.NDArray[np.int32]

_SEARCH = "search.json"
_SHARD = re.compile(r"shard(\d+)\.json")


class ShardWriter:
    """Crash-safe writer of the results of one shard; added rows survive a kill."""

    def __init__(self, folder: Path, shard_id: int, search: Mapping[str, Any]) -> None:
        """Start, or resume the results of the same search.

        Raises: ValueError when the folder belongs to another search.
        """
        self.path = folder / f"shard{shard_id}.json"
        self._partial = folder / f"shard{shard_id}.partial"
        _claim(folder, search)
        self.complete = self.path.exists()
        self.num_done = 0 if self.complete else self._cut_torn_line()

    def _cut_torn_line(self) -> int:
        """Drop a line that a kill cut off; returns the number of complete lines."""
        if not self._partial.exists():
            return 0
        with open(self._partial, "r+b") as file:
            content = file.read()
            complete_bytes = content.rfind(b"\n") + 1
            file.truncate(complete_bytes)
        return content.count(b"\n")

    def add(self, rows: Sequence[tuple[int, list[int]]]) -> None:
        """Append the neighbours of some segments."""
        with open(self._partial, "a", encoding="utf-8") as file:
            file.writelines(f'"{number}": {json.dumps(neighbors)}\n' for number, neighbors in rows)
        self.num_done += len(rows)

    def finish(self) -> None:
        """Write the shard's file from the added rows."""
        with writing(self.path) as file:
            file.write("{")
            for count, line in enumerate(_lines(self._partial)):
                file.write(("\n" if count == 0 else ",\n") + line)
            file.write("\n}\n")
        self._partial.unlink(missing_ok=True)
        self.complete = True


def _lines(path: Path) -> Iterator[str]:
    if path.exists():  # a shard without segments has no file
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def _claim(folder: Path, search: Mapping[str, Any]) -> None:
    """Record the search in its folder. Raises: ValueError when the folder holds another search."""
    path = folder / _SEARCH
    if not path.exists():
        write_json(path, search)
        return
    saved = read_json(path)
    for name in search:
        if saved.get(name) != search[name]:
            raise ValueError(
                f"{str(folder)!r} holds results of another search ({name} was {saved.get(name)!r}, is now "
                f"{search[name]!r}); give another --results_path or remove the folder"
            )


@dataclass(frozen=True)
class SegmentNeighbors:
    """The neighbours of all segments: those of segment i are ``ids[starts[i] : starts[i + 1]]``, best first."""

    ids: Numbers
    """int32, the concatenated lists."""
    starts: npt.NDArray[np.int64]
    """(segments + 1,)"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, segment: int) -> list[int]:
        """The neighbours of a segment, best first."""
        ids: list[int] = self.ids[self.starts[segment] : self.starts[segment + 1]].tolist()
        return ids


def read_results(folder: Path) -> SegmentNeighbors:
    """Read all shards. A segment is removed from its own list.

    Raises: ValueError when no shard exists, segments are missing or repeated, or a neighbour is not a segment.
    """
    paths = shard_files(folder)
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no shard<i>.json; run bm25_search.py")
    own_lists = [_read_shard(path) for path in paths]
    segments = np.concatenate([numbers for numbers, _, _ in own_lists])
    lengths = np.concatenate([lengths for _, lengths, _ in own_lists])
    ids = np.concatenate([ids for _, _, ids in own_lists])
    _require_each_once(folder, segments)
    unknown = ids[(ids < 0) | (ids >= len(segments))]
    if len(unknown):
        raise ValueError(
            f"{str(folder)!r} names segment {unknown[0]} as a neighbour, but holds results of segments 0 to "
            f"{len(segments) - 1} only; run bm25_search.py for the shards that are missing"
        )
    return _in_order(segments, lengths, ids)


def shard_files(folder: Path) -> list[Path]:
    """The complete shards of a results folder."""
    return sorted(path for path in folder.glob("shard*.json") if _SHARD.fullmatch(path.name))


def _in_order(
    segments: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> SegmentNeighbors:
    owners = np.repeat(segments, lengths)
    kept = ids != owners
    if not kept.all():
        logger.warning("dropped %d segments that are listed as their own neighbours", int((~kept).sum()))
    owners, ids = owners[kept], ids[kept]
    order = np.argsort(owners, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(segments)))])
    return SegmentNeighbors(ids[order].astype(np.int32), starts.astype(np.int64))


def _require_each_once(folder: Path, segments: npt.NDArray[np.int64]) -> None:
    expected = len(segments)
    if (folder / _SEARCH).exists():
        expected = read_record(folder / _SEARCH, Fields({"num_segments": WHOLE}))["num_segments"]
    largest = max(expected, int(segments.max(initial=-1)) + 1)
    times = np.bincount(segments, minlength=largest)
    repeated, missing = np.flatnonzero(times > 1), np.flatnonzero(times == 0)
    if len(repeated):
        raise ValueError(
            f"{str(folder)!r} holds {len(repeated)} segments more than once ({_preview(repeated)}); they come from "
            "different searches: remove the shards of the other one"
        )
    if len(missing):
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} of {largest} segments ({_preview(missing)}); run bm25_search.py for "
            "the shards that are missing"
        )


def _read_shard(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Segments, the lengths of their lists, and the concatenated lists."""
    content = read_json(path)
    try:
        # The original program wrote neighbours as strings (and did not find them when reading): accept both.
        lists = [np.array(neighbors, dtype=np.int64) for neighbors in content.values()]
        if any(len(neighbors.shape) != 1 for neighbors in lists):
            raise TypeError("the neighbours of a segment are no list")
        segments = np.array(list(content), dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds an entry that is not a segment number ({error}); run bm25_search.py again"
        ) from None
    if len(segments) and segments.min() < 0:
        raise ValueError(
            f"{path} holds segment {segments.min()}, segments are numbered from 0; run bm25_search.py again"
        )
    lengths = np.array([len(neighbors) for neighbors in lists], dtype=np.int64)
    return segments, lengths, np.concatenate([*lists, np.empty(0, dtype=np.int64)])


def _preview(numbers: npt.NDArray[np.int64]) -> str:
    return ", ".join(map(str, numbers[:3].tolist())) + (", ..." if len(numbers) > 3 else "")
