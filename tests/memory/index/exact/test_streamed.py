"""Exact search in a store larger than memory against the same search in memory, to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import set_fast_products
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import SHAPES, rows

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.exact import candidates, streamed
from fairseq.memory.index.exact import index as exact
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.types import Metric


@pytest.fixture
def little_memory(monkeypatch):
    """Small blocks of a few queries, and hardly any room for candidates."""
    monkeypatch.setattr(exact, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(exact, "_GROUP_SCORES", 64 * 20)
    for module in (candidates, streamed):
        monkeypatch.setattr(module, "capacity", lambda k: k + 84)


def mapped(folder: Path, keys: np.ndarray, *, half: bool, larger_than_memory: bool) -> ChunkedArray:
    path = folder / "keys"
    path.write_bytes(keys.astype(np.float16 if half else np.float32).tobytes())
    array = np.memmap(path, np.float16 if half else np.float32, "r", shape=keys.shape)
    return ChunkedArray([array], exceeds_ram=larger_than_memory)


@pytest.mark.parametrize("products", ["avx2", "library_int8", "bfloat16", "float32"])
@pytest.mark.usefixtures("little_memory")
@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    metric=st.sampled_from(list(Metric)),
    count=st.integers(1, 700),
    dim=st.sampled_from([1, 8, 40]),
    num_queries=st.integers(1, 40),
    half=st.booleans(),
    data=st.data(),
)
def test_every_neighbor_and_score_is_the_same(
    products, shape, metric, count, dim, num_queries, half, data, tmp_path_factory
):
    k = data.draw(st.integers(1, count))
    deleted = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=count - k, unique=True)), np.int64)
    keys = rows(shape, count, dim, 1)
    keys[count // 2 :] = keys[: count - count // 2]  # ties
    query_ND = torch.from_numpy(rows(shape, num_queries, dim, 2))
    folder = tmp_path_factory.mktemp("keys")
    with pytest.MonkeyPatch.context() as patch:
        set_fast_products(patch, products)
        found = []
        for larger in (False, True):
            store = mapped(folder, keys, half=half, larger_than_memory=larger)
            assert store.exceeds_ram == larger
            found.append(ExactIndex(store, metric, deleted=np.sort(deleted)).search(query_ND, k))
    assert torch.equal(found[0].ids_NK, found[1].ids_NK)
    assert torch.equal(found[0].scores_NK, found[1].scores_NK)


def test_each_key_is_read_once(tmp_path, monkeypatch):
    store = mapped(tmp_path, rows("clustered", 9000, 16, 1), half=True, larger_than_memory=True)
    read = []
    plain = ChunkedArray.block
    monkeypatch.setattr(ChunkedArray, "block", lambda keys, *more: read.append(more[1] - more[0]) or plain(keys, *more))
    index = ExactIndex(store)
    assert index.sample.shape == (512, 16)
    index.search(torch.from_numpy(rows("clustered", 50, 16, 2)), 100)
    assert sum(read) == 9000
