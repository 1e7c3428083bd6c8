"""fairseq-datastore doctor: what it says of a machine is what the searches do there."""

import pytest
import torch

from fairseq.memory.index.ops import products
from fairseq.memory.planning import doctor, measure


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(measure, "_DISK_BYTES", 32 << 20)


def said(folder):
    return dict(line.split(": ", 1) for line in doctor.report(folder))


@pytest.mark.parametrize(
    ("kind", "path", "is_slow"),
    [("library_int8", "8-bit", False), ("bfloat16", "bfloat16", False), ("float32", "float32", True)],
)
def test_search_paths_follow_from_the_processor(kind, path, is_slow, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "chosen", lambda: products.by_name(kind))
    monkeypatch.setattr(products, "measured", lambda: {"float32": 5e10, "avx2": 15e10})
    told = list(doctor.report(tmp_path))
    assert any(line.startswith(f"exact search: {path} products") and line.endswith(f"({kind})") for line in told)
    assert "products: measured once, thousand millions a second on one thread: avx2 150, float32 50" in told
    assert any(line.startswith("slow: exact search") for line in told) == is_slow
    assert any(
        line.startswith(f"searches of lists, and making them: {'8-bit' if kind == 'library_int8' else 'faiss'}")
        for line in told
    )


def test_versions_disk_and_threads_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    told = said(tmp_path)
    assert f"torch {torch.__version__.partition('+')[0]}" in told["versions"]
    assert told["versions"].endswith("no no-such-package")
    assert "MB/s" in told[f"disk of {tmp_path}"]
    assert any("0 of " in line for line in doctor.report(tmp_path) if line.startswith("slow: "))
    assert not list(tmp_path.iterdir()), "the measured file is removed"
