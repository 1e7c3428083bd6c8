"""Stores larger than memory, read by requests, against numpy over the same files."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.memory.datastore import chunked_array
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.convert import nonfinite_rows
from fairseq.memory.datastore.reading import file_rows, read_ahead
from fairseq.memory.datastore.reading.read_ahead import ReadAhead, iter_blocks

DIM = 37
SIZES = (300, 1, 999)
HEADER = 128


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(chunked_array, "fits_in_ram", lambda num_bytes: False)
    monkeypatch.setattr(read_ahead, "_BYTES_AHEAD", 4096)


@pytest.fixture(params=["direct", "no direct reads", "direct reads of another alignment"])
def file_system(request, monkeypatch):
    """What the system does with a request to go around the page cache."""
    opened, read = os.open, os.preadv
    direct: set[int] = set()

    def open_file(path, flags, *more):
        is_direct = bool(flags & getattr(os, "O_DIRECT", 0))
        if is_direct and request.param == "no direct reads":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = opened(path, flags, *more)
        (direct.add if is_direct else direct.discard)(descriptor)
        return descriptor

    def read_file(descriptor, buffers, offset):
        if descriptor in direct and request.param == "direct reads of another alignment":
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read_file)


def mapped(folder: Path, dtype: str) -> tuple[list[np.memmap], torch.Tensor]:
    """Files with something before their rows, and all rows."""
    generator = torch.Generator().manual_seed(0)
    whole_ND = torch.randn(sum(SIZES), DIM, generator=generator).to(getattr(torch, dtype))
    stored = whole_ND.view(torch.uint16) if dtype == "bfloat16" else whole_ND
    maps = []
    for number, rows in enumerate(torch.split(stored, SIZES)):
        path = folder / f"{number}.npy"
        path.write_bytes(bytes(HEADER) + rows.numpy().tobytes())
        maps.append(np.memmap(path, rows.numpy().dtype, "r", HEADER, (len(rows), DIM)))
    return maps, whole_ND


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("file_system")
def test_blocks_and_rows_are_those_of_the_files(dtype, tmp_path):
    maps, whole_ND = mapped(tmp_path, dtype)
    keys = ChunkedArray(maps, dtype)
    assert keys.exceeds_ram
    assert keys.row_bytes == DIM * whole_ND.element_size()
    for start, block_MD in iter_blocks(keys, 170, 3, 1290):
        assert torch.equal(block_MD, whole_ND[start : min(start + 170, 1290)])
    ids = np.random.default_rng(0).integers(0, len(keys), 500)
    assert torch.equal(keys.take(ids), whole_ND[ids].float())
    assert torch.equal(keys.take(np.sort(ids)), whole_ND[np.sort(ids)].float())
    assert keys.take(np.empty(0, np.int64)).shape == (0, DIM)
    assert not len(nonfinite_rows(keys, "float32"))


@pytest.mark.parametrize(("gap", "run"), [(0, 1), (100, 300), (1 << 20, 1 << 20)])
def test_rows_are_the_same_however_they_are_put_together(gap, run, tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "_GAP_BYTES", gap)
    monkeypatch.setattr(file_rows, "_RUN_BYTES", run)
    monkeypatch.setattr(file_rows, "_ANNOUNCED", 7)
    maps, whole_ND = mapped(tmp_path, "float16")
    ids = np.unique(np.random.default_rng(1).integers(0, len(whole_ND), 400))
    assert torch.equal(ChunkedArray(maps).take(ids), whole_ND[ids].float())


def test_a_slice_of_a_map_is_found_in_its_file(tmp_path):
    maps, whole_ND = mapped(tmp_path, "float32")
    keys = ChunkedArray([maps[2][100:200], maps[0][250:]])
    wanted_ND = torch.cat([whole_ND[401:501], whole_ND[250:300]])
    with ReadAhead(keys, [slice(0, 120), slice(120, 150)]) as blocks:
        assert torch.equal(torch.cat([blocks.block(0), blocks.block(1)]), wanted_ND)


def test_arrays_in_memory_are_not_read(tmp_path):
    maps, whole_ND = mapped(tmp_path, "float32")
    assert not ChunkedArray([whole_ND.numpy()]).exceeds_ram
    keys = ChunkedArray([whole_ND.numpy(), maps[1]])
    assert keys.exceeds_ram
    ((_, block_MD),) = iter_blocks(keys, 2000)
    assert torch.equal(block_MD, torch.cat([whole_ND, whole_ND[300:301]]))


def test_blocks_may_be_requested_out_of_order_and_skipped(tmp_path):
    maps, whole_ND = mapped(tmp_path, "float32")
    rows = [slice(at, at + 20) for at in range(0, 1300, 20)]
    with ReadAhead(ChunkedArray(maps), rows) as blocks:
        for number in (1, 0, 2, 2, 40, 41, 7, 64):
            assert torch.equal(blocks.block(number), whole_ND[rows[number]])


def test_a_mapped_file_without_its_name_is_read_through_the_map(tmp_path):
    maps, whole_ND = mapped(tmp_path, "float32")
    keys = ChunkedArray(maps)
    (tmp_path / "0.npy").unlink()
    aside = tmp_path / "aside"
    aside.write_bytes(bytes(maps[2].nbytes + HEADER))
    aside.replace(tmp_path / "2.npy")
    ((_, block_MD),) = iter_blocks(keys, 2000)
    assert torch.equal(block_MD, whole_ND)
    assert torch.equal(keys.take(torch.tensor([1000])), whole_ND[1000:1001])


def test_a_file_that_became_shorter_is_named(tmp_path):
    maps, _ = mapped(tmp_path, "float32")
    keys = ChunkedArray(maps)
    os.truncate(tmp_path / "2.npy", 5000)
    with pytest.raises(OSError, match=r"2\.npy ends at byte"):
        list(iter_blocks(keys, 100))
    with pytest.raises(OSError, match=r"2\.npy ends at byte"):
        keys.take(torch.tensor([1200]))
