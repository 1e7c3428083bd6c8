"""A build that dies at a chosen call."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fairseq.memory.index.faiss.builder import FaissBuilder


class Died(BaseException):
    """Stands for a kill."""


@contextmanager
def dies_at(monkeypatch: pytest.MonkeyPatch, step: str, call: int, index: Path) -> Iterator[None]:
    """Within, call number ``call`` of a builder's step dies; the index must not be there then."""
    calls = []
    original = getattr(FaissBuilder, step)

    def dying(self: FaissBuilder, *words: Any) -> Any:
        calls.append(step)
        if len(calls) > call:
            raise Died
        return original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(FaissBuilder, step, dying)
        try:
            yield
        except Died:
            assert not index.exists()
