"""The public face: the names of fairseq.memory and fairseq.hf, the page about them, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from forked_commands import Forks

from fairseq.memory.retrieval.sweep_outputs import _heat_map
from fairseq.moved import MOVED
from fairseq.runtime.lazy import MissingExtraError, missing_extra

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fairseq.memory", "fairseq.hf")


@pytest.fixture(scope="module")
def make_api() -> Iterator[Any]:
    """The script that writes the page."""
    sys.path.insert(0, str(ROOT / "docs"))
    yield importlib.import_module("make_api")
    sys.path.remove(str(ROOT / "docs"))


def imported_for_type_checkers(package: str) -> dict[str, str]:
    """Name -> module of the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.name: node.module or "" for node in block.body for alias in node.names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_of_names_agree(package: str, make_api: Any) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    section = re.search(rf"^## {re.escape(package)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    on_page = re.findall(r"^#### (\w+)$", section[1], re.MULTILINE)
    names = importlib.import_module(package).__all__
    assert sorted(on_page) == names == sorted(names)
    assert make_api.lazy_table(package) == imported_for_type_checkers(package)
    assert sorted(make_api.lazy_table(package)) == names
    assert dir(importlib.import_module(package)) == names


def test_the_pages_are_up_to_date(make_api: Any) -> None:
    stale = [path for path, page in make_api.PAGES.items() if (ROOT / path).read_text(encoding="utf-8") != page()]
    assert stale == [], "run python docs/make_api.py"


def test_every_name_has_an_example(make_api: Any) -> None:
    entries = re.split(r"^#### ", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)[1:]
    without = [entry.split()[0] for entry in entries if "```python" not in entry]
    assert without == []


def test_the_examples_of_the_page_run(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    script = tmp_path / "examples_of_the_page.py"
    checks = "assert built.rows == 1000\nassert 0.0 <= reto.saved_share <= 1.0\n"
    script.write_text("\n".join([*blocks, checks]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    done = forks.start(str(script))
    assert done.wait() == 0, done.err


@pytest.mark.parametrize(
    ("package", "wrong", "right"), [("fairseq.memory", "DataStore", "Datastore"), ("fairseq.hf", "KNNSave", "KNNSaver")]
)
def test_an_unknown_name_raises_with_the_nearest(package: str, wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=rf"'{package}' has no attribute '{wrong}' \(did you mean '{right}'\?\)"):
        getattr(importlib.import_module(package), wrong)


def test_a_private_name_is_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute '_joined'"):
        _ = importlib.import_module("fairseq.memory")._joined


@pytest.mark.parametrize(("module", "extra"), [("transformers", "hf"), ("matplotlib", "plot")])
def test_a_missing_package_is_one_line_with_the_pip_command(module: str, extra: str) -> None:
    error = missing_extra(ModuleNotFoundError("no such module", name=f"{module}.pyplot"))
    assert isinstance(error, MissingExtraError)
    assert "\n" not in str(error)
    assert f"pip install 'fairseq-memory[{extra}]'" in str(error)
    other = ModuleNotFoundError("no such module", name="typo")
    assert missing_extra(other) is other


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_extended_mind_without_transformers_names_the_extra() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import fairseq.hf
try:
    fairseq.hf.ExtendedMind
except ImportError as error:
    print(error)
"""
    done = run(code)
    assert done.stdout == "transformers is not installed; pip install 'fairseq-memory[hf]' brings it\n", done.stderr


def test_a_sweep_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert _heat_map(str(tmp_path / "x.png"), [], None, "valid") is False  # type: ignore[arg-type]
    assert caplog.messages == ["no heat map: matplotlib is not installed (pip install 'fairseq-memory[plot]')"]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_light(package: str) -> None:
    heavy = ("torch", "numpy", "faiss", "transformers", "numba")
    done = run(f"import sys, {package}; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_works_and_warns(old: str, command: Command, tmp_path: Path) -> None:
    name = {"hf": "KNNWrapper", "evaluation": "evaluate", "extended_mind": "extended_mind", "saver": "KNNSaver"}
    name |= {"extended_mind_interface": "from_pretrained", "knn": "KNNWrapper", "retomaton": "RetomatonWrapper"}
    name |= {"fixed": "Interpolation", "datastore_writer": "DatastoreWriter", "build_config": "BuildConfig"}
    name |= {"faiss_index": "FaissIndex", "joint_loss": "joint_loss", "joint_stream": "InBatchMemory"}
    name |= {"vocab_mixing": "VocabularyMixer", "bm25_lucene": "LuceneIndex", "clusters": "Clusters"}
    name |= {"knn_config": "KnnConfig", "retomaton_config": "RetomatonConfig", "members_files": "read_members"}
    public = "Retomaton" if "sources" in old else name[old.rpartition(".")[2]]
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from {old} import {public} as found
import importlib
assert found is getattr(importlib.import_module({MOVED[old]!r}), {public!r})
print(*[f"{{w.category.__name__}}: {{w.message}}" for w in seen if "is now" in str(w.message)], sep="\\n")
"""
    (tmp_path / "old.py").write_text(code, encoding="utf-8")
    done = command(str(tmp_path / "old.py"))
    assert f"DeprecationWarning: {old} is now {MOVED[old]}" in done.stdout, done.stderr


def test_old_modules_within_an_old_package_come_first() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
from fairseq.hf import KNNWrapper
from fairseq.memory.hf import extended_mind, knn
print(extended_mind.extended_mind.__name__, knn.KNNWrapper is KNNWrapper, "KNNWrapper" in dir(knn))
names = {}
exec("from fairseq.memory.hf.knn import *", names)
print(names["KNNWrapper"] is KNNWrapper, bool(knn.__doc__))
"""
    done = run(code)
    assert done.stdout == "extended_mind True True\nTrue True\n", done.stderr
