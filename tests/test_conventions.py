"""The project keeps its own habits; each check is shown a bad example first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import convention_checks
import pytest
from convention_checks import CHECKS, Source

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fairseq", "fairseq_cli", "tests", "benchmarks", "examples", "train_scripts")
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")

# What takes long to import: --help and `import fairseq` must do without.
HEAVY = {"torch", "faiss", "lightning", "transformers", "matplotlib", "tensorboard", "scipy"}


def project_sources() -> list[Source]:
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [Source.parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(paths)]


SOURCES = project_sources()


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_project_keeps_the_habit(name: str) -> None:
    complaints = CHECKS[name](SOURCES)
    assert not complaints, "\n" + "\n".join(complaints)


CONFIG = """
@dataclass(frozen=True)
class KnnConfig:
    k: int = flag("--k", default=8)
    def __post_init__(self):
        if self.k < 1: raise ValueError
"""

# check -> [(files, part of the only complaint)]
BAD: dict[str, list[tuple[dict[str, str], str]]] = {
    "module_length": [({"fairseq/a.py": "x = 1\n" * 501}, "fairseq/a.py:1: 501 lines")],
    "function_length": [({"tests/a.py": "def f():\n" + "    x = 1\n" * 80}, "f has 81 lines")],
    "no_print_in_library": [({"fairseq/a.py": "def f():\n    print(1)\n"}, "fairseq/a.py:2: print")],
    "no_parameter_called_args": [
        ({"fairseq/a.py": "def f(args): pass\n"}, "called args"),
        ({"fairseq/a.py": "class A:\n    def f(self, *, args=None): pass\n"}, "called args"),
        ({"fairseq_cli/a.py": "f = lambda args: args.x\n"}, "called args"),
    ],
    "layer_order": [
        (
            {"fairseq/memory/datastore/datastore.py": "from fairseq.models.transformer_lm import X\n"},
            "which stands above it",
        ),
        ({"fairseq/data/a.py": "def f():\n    from fairseq.modules import b\n"}, "fairseq/data/a.py:2"),
        ({"fairseq/trainer.py": "from fairseq_cli import train\n"}, "which stands above it"),
        ({"fairseq/brand_new.py": "x = 1\n"}, "has no layer"),
    ],
    "room_order": [
        ({"fairseq/memory/types.py": "import fairseq.memory.datastore.datastore\n"}, "which stands above it"),
        ({"fairseq/memory/index/ops/a.py": "from fairseq.memory.index.faiss import gpu\n"}, "which stands above it"),
        ({"fairseq/memory/brand_new.py": "x = 1\n"}, "has no floor"),
    ],
    "folder_size": [
        ({f"fairseq/data/{letter}.py": "x = 1\n" for letter in "abcdefghijklmno"}, "fairseq/data:1: 15 modules"),
    ],
    "imports_stay_where_they_belong": [
        ({"fairseq/memory/sources/a.py": "def f():\n    import faiss\n"}, "faiss may be imported only in"),
        ({"fairseq/models/a.py": "from transformers.models import gpt2\n"}, "transformers.models.gpt2 may"),
        ({"fairseq_cli/a.py": "import argparse\n"}, "argparse may"),
    ],
    "nothing_is_evaluated": [
        ({"fairseq/a.py": "x = eval('1')\n"}, "eval runs text"),
        ({"fairseq/a.py": "x = torch.load(p, weights_only=False)\n"}, "without weights_only=True"),
        ({"fairseq/a.py": "x = torch.load(p)\n"}, "without weights_only=True"),
        ({"fairseq/a.py": "x = np.load(p, allow_pickle=True)\n"}, "np.load runs"),
        ({"fairseq/a.py": "x = pickle.load(f)\n"}, "pickle.load runs"),
    ],
    "no_bare_exception": [({"fairseq/a.py": "raise Exception('no')\n"}, "another kind")],
    "only_ascii": [({"tests/a.py": "x = 1\n# caf\u00e9\n"}, "tests/a.py:2: not ASCII")],
    "every_config_field_is_read": [
        ({"fairseq/a.py": CONFIG}, "nothing reads KnnConfig.k"),
        ({"fairseq/a.py": CONFIG, "fairseq/b.py": "class Search:\n    def f(self): return self.k\n"}, "KnnConfig.k"),
        ({"fairseq/a.py": CONFIG, "tests/test_b.py": "def test_b(config): assert config.k\n"}, "KnnConfig.k"),
    ],
    "every_test_can_fail": [
        ({"tests/test_a.py": "def test_a():\n    compute()\n"}, "test_a asserts nothing"),
        ({"tests/test_a.py": "def test_a():\n    assert True\n"}, "test_a asserts nothing"),
        ({"tests/test_a.py": "def helper(): pass\ndef test_a():\n    helper()\n"}, "test_a asserts nothing"),
    ],
}


@pytest.mark.parametrize(("name", "files", "part"), [(n, f, p) for n, examples in BAD.items() for f, p in examples])
def test_a_check_sees_the_bad_example(name: str, files: dict[str, str], part: str) -> None:
    complaints = CHECKS[name]([Source.parse(path, text) for path, text in files.items()])
    assert len(complaints) == 1
    assert part in complaints[0]


def test_every_check_has_a_bad_example() -> None:
    assert set(BAD) == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("no_print_in_library", {"fairseq_cli/a.py": "print(1)\n"}),
        ("no_parameter_called_args", {"fairseq/config/flags.py": "def f(args): pass\n"}),
        (
            "layer_order",
            {"fairseq/models/a.py": "from fairseq.memory.datastore.datastore import Datastore\nimport torch\n"},
        ),
        ("imports_stay_where_they_belong", {"fairseq/memory/index/faiss_library.py": "import faiss\n"}),
        ("nothing_is_evaluated", {"fairseq/a.py": "model.eval()\nx = torch.load(p, weights_only=True)\n"}),
        ("every_config_field_is_read", {"fairseq/a.py": CONFIG, "fairseq/b.py": "def f(knn): return knn.k\n"}),
        ("every_config_field_is_read", {"fairseq/a.py": CONFIG + "    def double(self): return 2 * self.k\n"}),
        ("every_config_field_is_read", {"fairseq/a.py": CONFIG, "fairseq/b.py": "x = given.get('k', 1)\n"}),
        ("every_test_can_fail", {"tests/test_a.py": "def helper(): assert f()\ndef test_a():\n    helper()\n"}),
        ("every_test_can_fail", {"tests/test_a.py": "def test_a():\n    with pytest.raises(ValueError): f()\n"}),
    ],
)
def test_a_check_lets_the_good_example_pass(name: str, files: dict[str, str]) -> None:
    assert CHECKS[name]([Source.parse(path, text) for path, text in files.items()]) == []


def test_shell_scripts_and_settings_are_ascii() -> None:
    names = [path for pattern in ("*.sh", "*.toml", "*.txt", "Makefile") for path in ROOT.glob(pattern)]
    names += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh")]
    assert [path.name for path in names if not path.read_text(encoding="utf-8").isascii()] == []


def heavy_modules_after(code: str) -> set[str]:
    """Which of HEAVY are loaded when ``code`` has run in a fresh interpreter."""
    tail = f"\nimport sys; sys.stderr.write('loaded:' + ','.join({HEAVY!r} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    return set(told.stderr.rpartition("loaded:")[2].split(",")) - {""}


def test_heavy_modules_are_seen() -> None:
    assert "faiss" in heavy_modules_after("import sys; sys.modules['faiss'] = sys")


def test_import_fairseq_is_light() -> None:
    assert heavy_modules_after("import fairseq, fairseq_cli") == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light(script: str) -> None:
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert heavy_modules_after(code) == set()


def test_layers_name_no_module_that_is_gone() -> None:
    known = {source.module for source in SOURCES}
    named = {name for layer in convention_checks.LAYERS for name in layer}
    assert {name for name in named if name not in known and not (ROOT / name.replace(".", "/")).is_dir()} == set()
