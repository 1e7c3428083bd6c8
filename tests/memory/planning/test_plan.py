"""Estimates of a plan against real files and sums computed by hand."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from fairseq.config import UnreadableError
from fairseq.memory.datastore.config import count
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.candidates.room import CANDIDATE_BYTES, capacity
from fairseq.memory.planning.config import PlanConfig
from fairseq.memory.planning.estimate import SIZES, IndexRates, Rates, plan, training_keys
from fairseq.memory.planning.measure import measure

FACTORIES = {
    "flat": "Flat",
    "ivfpq": "IVF{c},PQ{m}np",
    "ivfsq8": "IVF{c},SQ8",
    "ivfpq-fastscan": "IVF{c},PQ{m2}x4fsr",
    "ivfrabitq": "RR{d},IVF{c},RaBitQ",
}
ONES = IndexRates(train=2.0, train_key=1e-3, add_key=1e-4, scan_key=1e-7, query=1e-5)
RATES = Rates(2e9, 1e9, 1e11, 1e10, 1e-10, 1e-4, {"flat": ONES, "ivfpq": ONES})


def config(**more) -> PlanConfig:
    return PlanConfig(**({"keys": 4000, "dim": 32, "ncentroids": 8, "code_size": 8, "k": 10} | more))


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_bytes_are_those_of_files(tmp_path, kind):
    wanted = config()
    keys = np.random.default_rng(0).standard_normal((wanted.keys, wanted.dim), dtype=np.float32)
    sizes = {"c": wanted.ncentroids, "m": wanted.code_size, "m2": 2 * wanted.code_size, "d": wanted.dim}
    index = faiss.index_factory(wanted.dim, FACTORIES[kind].format(**sizes))
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "index"))
    assert SIZES[kind](wanted).of(wanted.keys) == pytest.approx((tmp_path / "index").stat().st_size, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_are_those_of_a_store_and_its_index(tmp_path, dtype):
    wanted = config(dtype=dtype)
    keys = np.random.default_rng(0).standard_normal((wanted.keys, wanted.dim), dtype=np.float32)
    with DatastoreWriter(tmp_path / "d", wanted.keys, wanted.dim, dtype) as writer:
        writer.append(keys, np.zeros(wanted.keys, np.int64))
        writer.finish()
    made = plan(wanted, RATES, 1 << 34)
    assert made.store_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    built = build_index(
        BuildConfig(dstore_mmap=f"{tmp_path}/d", faiss_index=f"{tmp_path}/i", ncentroids=8, code_size=8)
    )
    (choice,) = (choice for choice in made.choices if choice.kind == "ivfpq")
    assert choice.disk == choice.memory == pytest.approx(built.bytes, rel=0.02)


def test_seconds_by_hand():
    wanted = config(keys=1_000_000, queries=5000, train_size=70_000, ncentroids=1000, probe=8)
    made = plan(wanted, RATES, 1 << 40)
    assert made.write_seconds == pytest.approx(made.store_bytes / 1e9)
    choices = {choice.kind: choice for choice in made.choices}
    assert list(choices) == ["exact", *SIZES]
    assert choices["exact"].search_seconds == pytest.approx(5000 * (1e-10 * 1e6 + 1e-4))
    assert choices["exact"].gpu_memory == 64_000_000
    lists = 1000 * 32 / 1e10
    assert training_keys(wanted, "ivfpq") == 70_000
    disk = choices["ivfpq"].disk
    moving = made.store_bytes / 2e9 + 2 * disk / 1e9 + disk / 2e9
    building = 10 * 70_000 * lists + 2.0 + 65_536 * 1e-3 + 1e6 * (lists + 1e-4) + moving
    assert choices["ivfpq"].build_seconds == pytest.approx(building)
    assert choices["ivfpq"].search_seconds == pytest.approx(5000 * (lists + 1e-7 * 8000 + 1e-5) + disk / 2e9)
    assert choices["flat"].search_seconds == pytest.approx(5000 * (1e-7 * 1e6 + 1e-5) + 128e6 / 2e9)
    assert choices["ivfrabitq"].build_seconds is None
    assert choices["ivfpq"].memory_building == disk + 4 * 32 * 70_000


def test_keys_that_do_not_fit_are_read_once_per_bulk():
    wanted = config(keys=1_000_000, queries=2_000_000, search_memory=1.0)
    rates = Rates(1e6, 1e9, 1e11, 1e10, 0.0, 0.0, {})
    exact = plan(wanted, rates, 1 << 20).choices[0]
    bulk = int(1e9) // (CANDIDATE_BYTES * capacity(10) + 12 * 32)
    assert bulk < 2_000_000
    assert exact.search_seconds == pytest.approx(-(-2_000_000 // bulk) * 136e6 / 1e6)
    assert plan(wanted, rates, 1 << 40).choices[0].search_seconds == pytest.approx(136e6 / 1e6)


def test_rates_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq.memory.planning.measure._DISK_BYTES", 32 << 20)
    monkeypatch.setattr("fairseq.memory.planning.measure._KEY_BYTES", 1 << 10)
    monkeypatch.setattr("fairseq.memory.planning.measure._FEW_KEYS", 1 << 10)
    rates = measure(config(folder=str(tmp_path), code_size=2))
    assert min(rates.read_bytes, rates.write_bytes, rates.matmul, rates.assign) > 1e6
    assert set(rates.indexes) == SIZES.keys() & INDEXES.keys()
    assert rates.exact_key + rates.exact_query > 0
    for measured in rates.indexes.values():
        assert min(vars(measured).values()) >= 0
        assert 0 < measured.scan_key + measured.query < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 5000}, "--k 5000 is larger than --keys 4000"),
        ({"ncentroids": 5000}, "--ncentroids 5000 is more than --keys 4000; give about 40"),
        ({"code_size": 12}, "--code-size 12 does not divide half the width 32; give 8, for example"),
        ({"dim": 7}, "give an even --dim"),
        ({"keys": 0}, "--keys must be at least 1"),
        ({"search_memory": 0.0}, "--search-memory must be at least 1e-06, got 0.0"),
    ],
)
def test_impossible_plans(given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_counts():
    assert count("103e6") == 103_000_000
    assert count("1.5e3") == 1500
    for text in ("1.5", "many", "nan", "inf"):
        with pytest.raises(UnreadableError, match="is not a whole number"):
            count(text)
