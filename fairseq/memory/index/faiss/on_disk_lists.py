"""Assembly of an index whose lists are kept in a file of their own, without holding them in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.index.faiss.builder import FaissBuilder, write_index
from fairseq.memory.index.faiss_library import SwigIndex, faiss_library
from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import replacing

_SLICE_ROWS = 4 << 20


def assemble_on_disk(builder: FaissBuilder, parts: Sequence[Array], index: Path, lists: Path) -> None:
    """Write the index to ``index`` and its lists to ``lists``.

    Slices of the rows become small indexes on disk, and each list is copied together from all of them, as faiss's
    ``merge_ondisk`` does it.

    Args:
        builder: trained and empty.
        parts: codes of all rows, in their order.
    """
    faiss = faiss_library()
    slices: list[Path] = []
    try:
        opened, rows = [], 0
        for codes in parts:
            for start in range(0, len(codes), _SLICE_ROWS):
                part = np.array(codes[start : start + _SLICE_ROWS])
                slices.append(index.with_name(f"{index.name}.slice{len(slices)}.tmp"))
                _write_slice(builder, part, rows, slices[-1])
                opened.append(faiss.read_index(str(slices[-1]), faiss.IO_FLAG_MMAP))
                rows += len(part)
        base = _lists_of(builder.inner)
        # Its file is mapped: a disk that gets full then would end the process without a word.
        if shutil.disk_usage(lists.parent).free < rows * (base.code_size + 8):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(lists))
        with replacing(lists) as aside:
            on_disk = faiss.OnDiskInvertedLists(base.nlist, base.code_size, aside)
            vector = faiss.InvertedListsPtrVector()
            for each in opened:
                vector.push_back(_lists_of(each).invlists)
            try:
                on_disk.merge_from_multiple(vector.data(), vector.size())
            except RuntimeError as error:
                raise OSError(f"{lists} cannot be written: {str(error).rpartition('Error: ')[2]}") from None
            base.replace_invlists(on_disk, False)
            base.ntotal = builder.inner.ntotal = rows
            on_disk.filename = str(lists)
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            # The index before the lists get their name: an older index of other lists must not be found with them.
            index.unlink(missing_ok=True)
        write_index(builder.inner, index)
    finally:
        for path in slices:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _write_slice(builder: FaissBuilder, codes: Array, first_row: int, path: Path) -> None:
    """An index of some rows under their final numbers."""
    faiss = faiss_library()
    part = faiss.clone_index(builder.inner)
    ids = np.arange(first_row, first_row + len(codes), dtype=np.int64)
    _lists_of(part).add_sa_codes(codes, ids)
    part.ntotal = len(codes)
    write_index(part, path)


def _lists_of(index: SwigIndex) -> Any:
    return faiss_library().downcast_index(faiss_library().extract_index_ivf(index))
