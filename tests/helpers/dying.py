"""Work that dies at a chosen call."""

import os
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


@contextmanager
def dies_at_event(monkeypatch: pytest.MonkeyPatch, event: int, aside: tuple[str, ...] = ()) -> Iterator[None]:
    """Within, the renaming or removal of a file that follows on ``event`` of them dies, those of locks aside.

    Args:
        aside: what the names of other files begin with that are not counted.
    Raises: AssertionError, of pytest, when the block ended before.
    """
    calls = []

    def dying(function: Any) -> Any:
        def call(*words: Any, **more: Any) -> Any:
            name = Path(words[0]).name
            if not name.endswith(".lock") and not name.startswith(aside):
                calls.append(words)
                if len(calls) > event:
                    raise Died
            return function(*words, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(Died):
            yield
