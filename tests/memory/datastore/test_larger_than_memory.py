"""What reads a store that is larger than memory makes of it what it makes of one in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.memory.datastore import chunked_array
from fairseq.memory.datastore.convert import convert
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.sources.external import ExternalMemory

ROWS, DIM = 3000, 16


@pytest.fixture
def store(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with DatastoreWriter(tmp_path / "store", ROWS, DIM, "float16") as writer:
        writer.append(torch.randn(ROWS, DIM, generator=generator), torch.arange(ROWS) % 97)
        writer.finish()
    return tmp_path / "store"


@pytest.fixture
def both(monkeypatch):
    """Call a function with the memory that there is, and with hardly any."""

    def call(function):
        first = function()
        with monkeypatch.context() as patch:
            patch.setattr(chunked_array, "fits_in_ram", lambda num_bytes: False)
            return first, function()

    return call


def test_indexes_are_the_same_files(store, both):
    number = iter(range(2))

    def build() -> bytes:
        name = store.with_name(f"index{next(number)}")
        config = BuildConfig(dstore_mmap=str(store), faiss_index=str(name), ncentroids=8, code_size=4, no_report=True)
        return build_index(config).path.read_bytes()

    plain, larger = both(build)
    assert plain == larger


def test_copies_are_the_same_files(store, both):
    number = iter(range(2))

    def copy() -> bytes:
        name = store.with_name(f"copy{next(number)}")
        convert(Datastore.open(store), name, "float32", {}, drop=False)
        return (store.parent / f"{name.name}_keys.npy").read_bytes()

    plain, larger = both(copy)
    assert plain == larger


@pytest.mark.parametrize("score", ["recompute", "index", "dot"])
@pytest.mark.parametrize("is_exact", [True, False])
def test_candidates_are_the_same(score, is_exact, store, both):
    name = store.with_name("index")
    build_index(BuildConfig(dstore_mmap=str(store), faiss_index=str(name), ncentroids=8, code_size=4, no_report=True))
    query_ND = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))

    def look_up():
        memory = ExternalMemory.open(store, None if is_exact else name, k=40, score=score)
        return memory.lookup(query_ND)

    plain, larger = both(look_up)
    np.testing.assert_array_equal(plain.rows_NM, larger.rows_NM)
    np.testing.assert_array_equal(plain.values_NM, larger.values_NM)
    torch.testing.assert_close(plain.scores_NM, larger.scores_NM, rtol=1e-6, atol=1e-5)
