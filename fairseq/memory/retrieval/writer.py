"""Crash-safe writer of the file of ``file.py``; an interrupted run resumes.

The file grows under ``<path>.tmp``; ``<path>.progress.json`` says how many of its rows are safely on disk. It gets its
name when it is whole. Memory does not grow with it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fairseq.memory.retrieval.file import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    ArraySpec,
    Retrieval,
    description_sum,
    differences,
    progress_of,
    specs_of,
)
from fairseq.memory.retrieval.schema import PROGRESS
from fairseq.memory.types import Array, Candidates, LogSums
from fairseq.runtime.atomic_files import naming
from fairseq.runtime.files import BLOCK_BYTES, BlockChecksums, locked, may_create_in, require_free_space, write_json
from fairseq.runtime.records import read_record

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096  # converted to the file's types at a time: a bulk of neighbours is large enough once


def existing(path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> Retrieval | None:
    """The complete file at ``path`` if it is there and holds what would be saved; None where there is none.

    Raises: ValueError when it holds anything else: it is not overwritten.
    """
    if not os.path.exists(path):
        return None
    there = Retrieval.open(path)
    other = differences(there.fingerprint, json.loads(json.dumps(fingerprint)))
    if other:
        raise ValueError(
            f"--save-retrieval {os.fspath(path)} is there and holds neighbours of another evaluation (there and here: "
            f"{other}); give another name, or remove it"
        )
    there.verify()
    return there


class RetrievalWriter:
    """Appends scored tokens with their neighbours; each ``append`` survives a kill, ``finish`` gives the file its name.

    Use it as a context manager or call ``finish``: both let go of the lock.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_tokens: int,
        k: int,
        *,
        num_types: int,
        num_rows: int,
        text_sums: bool,
        fingerprint: Mapping[str, Any],
        about: Mapping[str, Any],
        resume: bool = True,
    ) -> None:
        """Start, or resume where an interrupted writer of the same content stopped (``rows_done``).

        Args:
            num_tokens: scored tokens the file will hold.
            num_types: size of the dictionary.
            num_rows: rows of the datastore.
            text_sums: whether sums of memories of the text come with each token.
            fingerprint: what decides the content, plain values; equal ones must mean equal content.
            about: more to keep, plain values.
            resume: False throws away what an interrupted writer left.
        Raises: OSError when the disk is too small or another writer is at work.
        """
        self.path, self.num_tokens = Path(path), num_tokens
        self._specs = specs_of(num_tokens, k, num_types=num_types, num_rows=num_rows, text_sums=text_sums)
        self._aside = self.path.with_name(self.path.name + ".tmp")
        self._signature = json.loads(
            json.dumps({"made_of": fingerprint, "specs": [vars(spec) for spec in self._specs]})
        )
        self._file_metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "made_of": json.dumps(fingerprint)}
        self._file_metadata["about"] = json.dumps(about)
        self._file_metadata["description"] = description_sum(self._file_metadata)
        may_create_in(self.path.absolute().parent)
        with ExitStack() as until_ready:
            until_ready.enter_context(locked(Path(f"{self.path}.lock"), f"{str(self.path)!r}"))
            state = self._left_over() if resume else None
            self.rows_done = int(state["rows_done"]) if state else 0
            self._sums = {s.name: BlockChecksums(state and state["checksums"][s.name]) for s in self._specs}
            self._check_free_space()
            self._file = until_ready.enter_context(open(self._aside, "r+b" if state else "w+b", buffering=0))
            self._starts = self._lay_out(keep=bool(state))
            self._open = until_ready.pop_all()

    def __enter__(self) -> RetrievalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(
        self,
        block_N: Tensor,
        target_N: Tensor,
        continues_N: Array,
        lm_logp_N: Tensor,
        lm_norm_N: Tensor,
        text_sums: LogSums | None,
        found: Candidates,
    ) -> None:
        """Append scored tokens and put them safely on disk."""
        assert found.rows_NM is not None, "the memory does not record the rows of its candidates"
        count = len(target_N)
        assert self.rows_done + count <= self.num_tokens, (self.rows_done, count, self.num_tokens)
        for start in range(0, count, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, count))
            keep_NK = found.keep_NM[rows]
            columns: dict[str, Any] = {
                "block": block_N[rows],
                "target": target_N[rows],
                "continues": continues_N[rows],
                "lm_logp": lm_logp_N[rows],
                "lm_norm": lm_norm_N[rows],
                "ids": found.rows_NM[rows],
                "values": found.values_NM[rows].masked_fill(~keep_NK, 0),
                "scores": found.scores_NM[rows].masked_fill(~keep_NK, -np.inf),
            }
            if text_sums is not None:
                columns |= {"near_hit": text_sums.hit_N[rows], "near_whole": text_sums.whole_N[rows]}
            self._write(columns, rows.stop - rows.start)
        self._record()

    def saved(self) -> Retrieval:
        """The content so far, as a reader sees it; rows from ``rows_done`` on mean nothing."""
        return Retrieval.read(self._aside)

    def finish(self) -> None:
        """Give the file its name. Raises: ValueError when rows are missing; what is there is kept."""
        if self.rows_done != self.num_tokens:
            raise ValueError(
                f"{self.path} has {self.rows_done} of {self.num_tokens} tokens; they are kept: the same command resumes"
            )
        self._write_at(0, memoryview(self._header({name: sums.digests() for name, sums in self._sums.items()})))
        with naming(self._aside):
            os.fsync(self._file.fileno())
        os.replace(self._aside, self.path)
        progress_of(self.path).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file and the lock; what is not finished stays for the next writer."""
        self._open.close()

    def _write(self, columns: Mapping[str, Any], count: int) -> None:
        for spec in self._specs:
            column = columns[spec.name]
            rows = column.cpu().numpy() if isinstance(column, Tensor) else column
            data = np.ascontiguousarray(rows, DTYPES[spec.dtype]).reshape(-1).view(np.uint8).data
            assert len(data) == count * spec.row_bytes, (spec, len(data), count)
            self._write_at(self._starts[spec.name] + self.rows_done * spec.row_bytes, data)
            self._sums[spec.name].update(data)
        self.rows_done += count

    def _write_at(self, place: int, data: memoryview) -> None:
        with naming(self._aside):
            self._file.seek(place)
            while len(data):  # unbuffered, so that closing has nothing to write that may fail again
                data = data[self._file.write(data) :]

    def _record(self) -> None:
        with naming(self._aside):
            os.fsync(self._file.fileno())
        state = {"signature": self._signature, "rows_done": self.rows_done, "num_tokens": self.num_tokens}
        write_json(progress_of(self.path), state | {"checksums": {n: sums.state() for n, sums in self._sums.items()}})

    def _left_over(self) -> dict[str, Any] | None:
        """The progress of an interrupted writer of the same content, if its rows are there."""
        if not progress_of(self.path).exists():
            return None
        state = read_record(progress_of(self.path), PROGRESS)
        if state["signature"] != self._signature:
            logger.warning(
                "%s: another command left %d tokens unfinished; they are thrown away", self.path, state["rows_done"]
            )
        elif not self._aside.exists() or self._aside.stat().st_size < sum(spec.nbytes for spec in self._specs):
            logger.warning("%s is shorter than its progress file says; starting again", self._aside)
        else:
            return state
        progress_of(self.path).unlink()
        return None

    def _check_free_space(self) -> None:
        """Raise OSError with both numbers when the rest of the file does not fit on the disk."""
        rest = (self.num_tokens - self.rows_done) * sum(spec.row_bytes for spec in self._specs)
        folder = self.path.absolute().parent
        require_free_space(folder, rest, f"--save-retrieval {self.path}", "save fewer neighbours (--k)")

    def _lay_out(self, *, keep: bool) -> dict[str, int]:
        """Give the file its size and a header without checksums; returns where each array begins."""
        header = self._header({name: ["0" * 8] * -(-self._nbytes(name) // BLOCK_BYTES) for name in self._sums})
        starts, at = {}, len(header)
        for spec in self._specs:
            starts[spec.name] = at
            at += spec.nbytes
        if not keep:
            self._write_at(0, memoryview(header))
        with naming(self._aside):
            self._file.truncate(at)
        return starts

    def _nbytes(self, name: str) -> int:
        return next(spec.nbytes for spec in self._specs if spec.name == name)

    def _header(self, checksums: Mapping[str, list[str]]) -> bytes:
        """The header of a safetensors file; its length does not depend on the checksums."""
        content: dict[str, Any] = {"__metadata__": self._file_metadata | {"checksums": json.dumps(checksums)}}
        content |= _entries(self._specs)
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _entries(specs: tuple[ArraySpec, ...]) -> dict[str, Any]:
    entries, at = {}, 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (at, at + spec.nbytes)}
        at += spec.nbytes
    return entries
