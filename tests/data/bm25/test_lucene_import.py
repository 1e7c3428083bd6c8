"""The import of pyserini, by stand-ins for it and for its Java bridge."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairseq.data.bm25 import lucene


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pyserini that, as 1.6.0 does, makes a client on import that an empty key ends."""
    folder = tmp_path / "pyserini" / "search" / "lucene"
    folder.mkdir(parents=True)
    for package in (folder.parent.parent, folder.parent):
        (package / "__init__.py").touch()
    (folder / "__init__.py").write_text(
        "import os\n"
        "if not os.environ.get('OPENAI_API_KEY'):\n    raise RuntimeError('no credentials')\n"
        "class LuceneSearcher:\n    def __init__(self, folder):\n        self.folder = folder\n"
    )
    (tmp_path / "jnius.py").write_text(
        "class autoclass:\n    def __init__(self, name): ...\n    def setMaxClauseCount(self, count): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _forget_pyserini()
    yield
    _forget_pyserini()  # or another test's stand-ins would not be imported


def _forget_pyserini() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pyserini", "jnius")]:
        del sys.modules[name]


@pytest.mark.parametrize("key", [None, "", "mine"])
def test_pyserini_loads_without_a_key_and_none_is_left(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert lucene._searcher(Path("index")).folder == "index"
    assert os.environ.get("OPENAI_API_KEY") == key
