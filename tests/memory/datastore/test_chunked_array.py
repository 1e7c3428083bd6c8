"""Rows of several arrays against numpy's concatenation of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.memory.datastore.chunked_array import ChunkedArray

DIM = 3


def arrays(sizes: list[int], dtype: str) -> list[np.ndarray]:
    """As they are on disk."""
    rng = np.random.default_rng(sum(sizes))
    parts = [torch.from_numpy(rng.standard_normal((size, DIM), dtype=np.float32)) for size in sizes]
    typed = [part.to(getattr(torch, dtype)) for part in parts]
    return [part.view(torch.uint16).numpy() if dtype == "bfloat16" else part.numpy() for part in typed]


def as_float(parts: list[np.ndarray], dtype: str) -> np.ndarray:
    """The oracle: a bfloat16 is the upper half of a float32."""
    whole = np.concatenate(parts)
    return (whole.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else whole.astype(np.float32)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.data(),
)
def test_blocks_and_rows_are_those_of_the_parts_put_together(sizes, dtype, data):
    parts = arrays(sizes, dtype)
    truth = as_float(parts, dtype)
    rows = ChunkedArray(parts, dtype)
    assert (len(rows), rows.shape, rows.dtype) == (len(truth), truth.shape, dtype)
    assert rows.nbytes == truth.size * (4 if dtype == "float32" else 2)
    np.testing.assert_array_equal(rows, truth)
    start = data.draw(st.integers(0, len(truth)))
    stop = data.draw(st.integers(start, len(truth) + 3))
    block = rows.block(start, stop)
    assert block.dtype is getattr(torch, dtype)
    np.testing.assert_array_equal(block.float(), truth[start:stop])
    ids = data.draw(st.lists(st.integers(0, len(truth) - 1), max_size=12)) if len(truth) else []
    for given_as in (np.array(ids, dtype=np.int64), torch.tensor(ids, dtype=torch.int64)):
        taken = rows.take(given_as)
        assert taken.dtype is torch.float32
        np.testing.assert_array_equal(taken, truth[ids])
    np.testing.assert_array_equal(rows.in_memory(), truth)


def test_a_block_within_one_part_is_a_view():
    parts = arrays([4, 6], "float32")
    rows = ChunkedArray(parts)
    assert rows.block(4, 10).data_ptr() == parts[1].ctypes.data
    assert rows.block(5, 7).data_ptr() == parts[1][1:].ctypes.data
    assert rows.single_array is None
    assert ChunkedArray.of(parts[0]).single_array is parts[0]
    assert ChunkedArray.of(rows) is rows
    assert ChunkedArray(arrays([4], "float16")).single_array is None


def test_integers_are_taken_as_int64():
    rows = ChunkedArray([np.array([5, -1], np.int16), np.array([7], np.int16)])
    assert rows.shape == (3,)
    taken = rows.take(np.array([2, 0, 2]))
    assert taken.dtype is torch.int64
    assert taken.tolist() == [7, 5, 7]


def test_mapped_files_are_named(tmp_path):
    for name in "ab":
        np.ones((2, DIM), np.float32).tofile(tmp_path / name)
    mapped = [np.memmap(tmp_path / name, np.float32, "r", shape=(2, DIM)) for name in "ab"]
    assert ChunkedArray(mapped).files == [tmp_path / "a", tmp_path / "b"]
    assert ChunkedArray(mapped).in_memory().files == []


@pytest.mark.parametrize("count", [3, 5, 40])  # fewer than there are rows, as many, and more
def test_rows_of_a_mapped_file_are_taken_in_any_order(tmp_path, count):
    values = np.arange(7, 12, dtype=np.int32)
    values.tofile(tmp_path / "values")
    rows = ChunkedArray([np.memmap(tmp_path / "values", np.int32, "r", shape=(5,))])
    ids = np.random.default_rng(count).integers(0, 5, count)
    taken = rows.take(ids)
    assert taken.dtype is torch.int64
    np.testing.assert_array_equal(taken, values[ids])
    with pytest.raises((AssertionError, IndexError)):
        rows.take(np.full(count, 5))
    with pytest.raises((AssertionError, IndexError)):
        rows.take(np.full(count, -1))


def test_parts_of_different_kinds_are_rejected():
    one = np.ones((2, DIM), np.float32)
    with pytest.raises(ValueError, match="type float32 and width 3 and of type float16 and width 3"):
        ChunkedArray([one, one.astype(np.float16)])
    with pytest.raises(ValueError, match="type float32 and width 3 and of type float32 and width 4"):
        ChunkedArray([one, np.ones((2, 4), np.float32)])
