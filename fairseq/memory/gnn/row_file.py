"""A large array of rows on disk with a JSON file of what it was made of; its writer resumes after a kill.

``PATH`` is an ordinary ``.npy`` file of (rows, width), so that other programs read it. ``PATH.json`` is written last;
while ``PATH.progress.json`` is there, the rows are in ``PATH.tmp``.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_array
from fairseq.runtime.atomic_files import naming
from fairseq.runtime.file_marks import MARK, differs, mark_of
from fairseq.runtime.files import (
    DAMAGED,
    BlockChecksums,
    locked,
    may_create_in,
    read_json,
    require_free_space,
    write_json,
)
from fairseq.runtime.records import (
    FLAG,
    OBJECT,
    POSITIVE,
    SUMS,
    TEXT,
    WHOLE,
    Fields,
    is_sealed,
    one_of,
    read_record,
    require,
    seal,
)

logger = logging.getLogger(__name__)

FORMAT = "fairseq-memory rows 1"
DTYPES = ("float16", "float32", "int32", "int64", "uint8")
SECONDS_BETWEEN_CHECKPOINTS = 5.0

_SHAPE = {"rows": POSITIVE, "width": POSITIVE, "dtype": one_of(*DTYPES), "made_of": OBJECT}
_SIDECAR = Fields({"format": TEXT, "file": MARK, **_SHAPE})
_PROGRESS = Fields({"signature": Fields(_SHAPE), "rows_done": WHOLE, "checksums": SUMS, "finishing": FLAG})


def beside(path: str | os.PathLike[str], ending: str) -> Path:
    """A file beside the array: ``json``, ``progress.json``, ``tmp`` or ``lock``."""
    return Path(f"{os.fspath(path)}.{ending}")


def file_bytes(num_rows: int, width: int, dtype: str) -> int:
    """Size of the array's file: rows and the header of ``.npy``; its JSON file is not counted."""
    kind = np.dtype(dtype)
    return len(_header(kind, (num_rows, width))) + num_rows * width * kind.itemsize


@dataclass(frozen=True)
class RowFile:
    """An opened array; its rows stay on disk and are read as they are used."""

    path: Path
    rows: ChunkedArray
    made_of: Mapping[str, Any]
    """What decides its content, plain values."""
    mark: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RowFile:
        """Map an array. Raises: ValueError when it is missing, not complete, damaged or of another program."""
        path, side = Path(path), beside(path, "json")
        if not side.exists():
            unfinished = beside(path, "progress.json").exists()
            state = "is not complete; run the command that writes it again to resume" if unfinished else "is not there"
            raise ValueError(f"{path} {state}{'' if unfinished else f' (no {side}); name another, or write it first'}")
        if not path.is_file():
            raise ValueError(f"{path} is not there, only {side}; copy it again, or remove that and write it again")
        content = read_json(side)
        require(content, _SIDECAR, str(side))
        if content["format"] != FORMAT or is_sealed(content) is not True:
            raise ValueError(f"{side} is damaged or of another release ({content['format']!r}); {DAMAGED}")
        array = read_array(path, "is no array of rows", mapped=True)
        shape, dtype = (content["rows"], content["width"]), content["dtype"]
        if array.shape != shape or str(array.dtype) != dtype:
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, {side} says {dtype} {shape}; {DAMAGED}")
        reason = differs(path, content["file"], whole=False)
        if reason is not None:
            raise ValueError(f"{path} is damaged: {reason}; {DAMAGED}")
        return cls(path, ChunkedArray([array]), content["made_of"], content["file"])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, ids_N: Tensor) -> Tensor:
        """Some rows, ascending, in their own type."""
        return self.rows.block(0, len(self)).index_select(0, ids_N)

    def verify(self) -> None:
        """Compare every block with its checksum. Raises: ValueError naming the bytes that differ."""
        reason = differs(self.path, self.mark, whole=True)
        if reason is not None:
            raise ValueError(f"{self.path} is damaged: {reason}; {DAMAGED}")


def require_ours(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where a folder, or files that no writer of rows left, have the names that one would write."""
    path, side = Path(path), beside(path, "json")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if side.exists():
        if not describes_rows(side):
            raise ValueError(f"{side} is there and describes no rows of ours; give another name")
        return
    progress = beside(path, "progress.json")
    # Between the renames at the end of a writer the array has its name, and no JSON file yet.
    ends = progress.exists() and read_record(progress, _PROGRESS)["finishing"]
    if os.path.lexists(path) and not ends:
        raise ValueError(
            f"{path} is there and no {side.name} beside it says that it holds rows of ours; give another name"
        )


def describes_rows(side: Path) -> bool:
    """True for the JSON file of an array of rows, which may be damaged; False where there is none."""
    try:
        content = read_json(side)
    except (ValueError, FileNotFoundError):
        return False
    return content.get("format") == FORMAT or _SHAPE.keys() <= content.keys()


def existing(path: str | os.PathLike[str], made_of: Mapping[str, Any]) -> RowFile | None:
    """The complete array that a command would write; None where there is none.

    Raises: ValueError with both values when it was made of anything else, and as :func:`require_ours`.
    """
    require_ours(path)
    if not beside(path, "json").exists():
        return None
    there = RowFile.open(path)
    _require_same(f"{os.fspath(path)} is complete", there.made_of, _plain(made_of), "it")
    return there


def _require_same(state: str, there: Mapping[str, Any], wanted: Mapping[str, Any], which: str) -> None:
    """Raise ValueError with both values of the first fact that differs."""
    for name in [*wanted, *sorted(there.keys() - wanted.keys())]:
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"{state} and its {name} is {there.get(name)!r}, that of this command is {wanted.get(name)!r}; give "
                f"another name, or remove {which}"
            )


class RowWriter:
    """Appends rows; those of a :meth:`checkpoint` survive a kill, and ``finish`` gives the file its name.

    A writer with the same arguments resumes at ``rows_done``. Use it as a context manager: that releases the lock.

    ```python
    with RowWriter("codes.npy", num_rows=1000, width=8, dtype="uint8", made_of={"store": digest}) as writer:
        while writer.rows_done < 1000:
            writer.append(next_rows(writer.rows_done))
            writer.checkpoint_when_due()
        writer.finish()
    ```
    """

    def __init__(
        self, path: str | os.PathLike[str], num_rows: int, width: int, dtype: str, made_of: Mapping[str, Any]
    ) -> None:
        """Start, or resume an interrupted writer with the same arguments.

        Args:
            made_of: what decides the content, plain values; equal ones must mean equal rows.
        Raises: ValueError for impossible arguments, or where another command's rows, complete or not, or a file of
            another program would be lost; OSError when the disk is too small or another writer is active.
        """
        if num_rows < 1 or width < 1 or dtype not in DTYPES:
            raise ValueError(f"{num_rows} rows of {width} {dtype} are no array; give counts, and one of {DTYPES}")
        self.path, self.num_rows, self.width, self.dtype = Path(path), num_rows, width, np.dtype(dtype)
        self._signature = {"rows": num_rows, "width": width, "dtype": dtype, "made_of": _plain(made_of)}
        self._aside, self._progress = beside(path, "tmp"), beside(path, "progress.json")
        header = _header(self.dtype, (num_rows, width))
        self._header_bytes = len(header)
        self._row_bytes = width * self.dtype.itemsize
        self._recorded = time.perf_counter()
        require_ours(self.path)
        may_create_in(self.path.absolute().parent)
        with ExitStack() as until_ready:
            until_ready.enter_context(locked(beside(path, "lock"), f"{str(self.path)!r}"))
            state = self._interrupted_state()
            self.rows_done = int(state["rows_done"]) if state else 0
            self.is_finished = bool(state and state["finishing"])
            self._sums = BlockChecksums(state and state["checksums"])
            if not self.is_finished:
                self._check_free_space()
                self._file = until_ready.enter_context(open(self._aside, "r+b" if state else "wb"))
                if state:
                    size = self._header_bytes + self.rows_done * self._row_bytes
                    self._file.truncate(size)
                    self._file.seek(size)
                else:
                    self._write(memoryview(header))
            self._open = until_ready.pop_all()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        try:
            self.close()
        except OSError:  # closing flushes the buffer, and fails as the write before did
            if failure is None:
                raise

    def append(self, rows_NX: Array | Tensor) -> None:
        """Add rows at the end, in the array's type or one that converts to it.

        Raises: ValueError when the width differs, there are too many, or a number is not finite in the array's type.
        """
        rows = rows_NX.detach().cpu().numpy() if isinstance(rows_NX, Tensor) else rows_NX
        if rows.ndim != 2 or rows.shape[1] != self.width or self.rows_done + len(rows) > self.num_rows:
            raise ValueError(
                f"rows {rows.shape} do not fit {self.path}, which has {self.rows_done} of {self.num_rows} rows of "
                f"width {self.width}"
            )
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(rows, dtype=self.dtype)
        if self.dtype.kind == "f" and not np.isfinite(data).all():
            raise ValueError(
                f"a number of rows {self.rows_done} to {self.rows_done + len(rows) - 1} is not finite in {self.dtype}; "
                "write float32, or check the model"
            )
        self._write(data.reshape(-1).view(np.uint8).data)
        self.rows_done += len(rows)

    def checkpoint(self) -> None:
        """Sync all rows so far to disk, so that they survive a kill."""
        self._record(finishing=False)

    def checkpoint_when_due(self, seconds: float = SECONDS_BETWEEN_CHECKPOINTS) -> None:
        """A :meth:`checkpoint` if the last one, or the start, is some seconds ago."""
        if time.perf_counter() - self._recorded > seconds:
            self.checkpoint()
            self._recorded = time.perf_counter()

    def finish(self) -> RowFile:
        """Give the file its name and write its JSON file. Raises: ValueError when rows are missing; they are kept."""
        if not self.is_finished:
            if self.rows_done != self.num_rows:
                raise ValueError(
                    f"{self.path} has {self.rows_done} of {self.num_rows} rows; they are kept: run the same command to "
                    "resume"
                )
            self._record(finishing=True)
            self._install(read_record(self._progress, _PROGRESS))
        self.close()
        return RowFile.open(self.path)

    def close(self) -> None:
        """Close the file and release the lock; the next writer resumes from the last checkpoint."""
        self._open.close()

    def _write(self, data: memoryview) -> None:
        with naming(self._aside):
            self._file.write(data)
        self._sums.update(data)

    def _record(self, *, finishing: bool) -> None:
        with naming(self._aside):
            self._file.flush()
            os.fsync(self._file.fileno())
        state = {"signature": self._signature, "rows_done": self.rows_done, "checksums": self._sums.state()}
        write_json(self._progress, state | {"finishing": finishing})

    def _interrupted_state(self) -> dict[str, Any] | None:
        """The progress of an interrupted writer of the same content, if its rows are there."""
        if not self._progress.exists():
            return None
        state = read_record(self._progress, _PROGRESS)
        facts, wanted = _facts(state["signature"]), _facts(self._signature)
        if state["finishing"]:
            self._install(state)  # all rows were written: complete it, whichever command wrote them
            _require_same(f"{self.path} is complete", facts, wanted, "it")
            return state
        unfinished = f"{self._progress} is of {state['rows_done']} rows of an unfinished command"
        _require_same(unfinished, facts, wanted, "it")
        size = self._header_bytes + state["rows_done"] * self._row_bytes
        if not self._aside.exists() or self._aside.stat().st_size < size:
            logger.warning("%s is shorter than its progress file says; starting again", self._aside)
        else:
            return state
        self._progress.unlink()
        return None

    def _install(self, state: Mapping[str, Any]) -> None:
        """Rename the array and describe it; safe to repeat after a kill at any point."""
        side = beside(self.path, "json")
        if self._aside.exists():
            side.unlink(missing_ok=True)  # of an older array, which is about to be replaced
            os.replace(self._aside, self.path)
        mark = mark_of(self.path.stat().st_size, BlockChecksums(state["checksums"]).digests())
        write_json(side, seal({"format": FORMAT, **state["signature"], "file": mark}))
        self._progress.unlink()

    def _check_free_space(self) -> None:
        """Raise OSError with both numbers when the rest does not fit on the disk."""
        missing = (self.num_rows - self.rows_done) * self._row_bytes
        require_free_space(self.path.absolute().parent, missing, str(self.path), "store product-quantizer codes")


def _facts(signature: Mapping[str, Any]) -> dict[str, Any]:
    shape = {"number of rows": signature["rows"], "width": signature["width"], "type": signature["dtype"]}
    return {**shape, **signature["made_of"]}


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(content)))
    return plain
