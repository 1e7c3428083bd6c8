"""The scripts of examples/python, each run as a user runs it: in a folder of its own, with nothing at hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "python"


def run(script: str, folder: Path) -> str:
    if script == "wrap_a_hugging_face_model":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, FOLDER / f"{script}.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.parametrize(
    "script", ["mix_a_store_into_logits", "score_with_trime_memories", "wrap_a_hugging_face_model"]
)
def test_a_memory_lowers_the_perplexity(script: str, tmp_path: Path) -> None:
    without, with_memory = numbers(run(script, tmp_path))
    assert with_memory < without / 5


def test_exact_search_equals_brute_force(tmp_path: Path) -> None:
    assert "equal to brute force: 100.0%" in run("exact_search", tmp_path)


def test_the_built_index_finds_most_neighbours(tmp_path: Path) -> None:
    recalls = numbers(run("build_an_index", tmp_path))
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.8


def test_every_script_is_run_and_explained() -> None:
    text = Path(__file__).read_text()
    page = (ROOT / "docs" / "examples.md").read_text()
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert len(names) == 5
    assert [name for name in names if f'"{name}"' not in text or f"## {name}.py" not in page] == []
