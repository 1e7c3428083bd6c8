"""Programs that drive a model, those that are installed: each of examples/huggingface/clients with each kind of memory.

The checks are the example's: what a program gave against a brute-force mixture, or the model called directly.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "huggingface" / "clients"
CLIENTS = sorted(path.stem.removesuffix("_client") for path in FOLDER.glob("*_client.py"))


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("clients")
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[module.__name__]


def test_every_client_is_run(clients):
    assert sorted(clients.CLIENTS) == CLIENTS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knn", "retomaton", "extended_mind"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gives_what_the_model_with_the_memory_gives(clients, client, kind):
    for package in clients.CLIENTS[client]:
        pytest.importorskip(package)
    checks = clients.checks_of(client, kind)
    assert checks
    assert [check for check in checks if not check.passes] == []


def test_a_check_fails_for_another_number_and_a_refusal_for_another_reason(clients):
    tiny = importlib.import_module("tiny")
    assert not tiny.Check("it", float("nan")).passes
    assert not tiny.Check("it", tiny.difference([1.0, 2.0], [1.0])).passes
    assert not tiny.Check("it", tiny.difference([1.0, 2.0], [1.0, 2.5])).passes
    assert tiny.Check("it", tiny.difference([1.0, 2.0], [1.0, 2.0])).passes
    assert not tiny.refusal("it", "because", lambda: None).passes
