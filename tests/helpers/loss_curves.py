"""The loss of every update of a train.py run with all its digits, which the log's lines round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_PLUGIN = """import json
import sys
import types


def init(project):
    file = open(project, "a", buffering=1)
    return types.SimpleNamespace(
        log=lambda figures, step: file.write(json.dumps([step, figures]) + chr(10)), finish=file.close
    )


sys.modules["wandb"] = types.SimpleNamespace(init=init)
"""
_FIGURES = "figures.jsonl"


def recording(folder: Path) -> list[str]:
    """Flags with which train.py adds the figures of each update to a file in a folder, through a stand-in for wandb."""
    folder.mkdir(exist_ok=True)
    plugin = folder / "records_figures.py"
    plugin.write_text(_PLUGIN)
    return ["--user-dir", str(plugin), "--wandb-project", str(folder / _FIGURES), "--log-interval", "1"]


def loss_curve(folder: Path) -> dict[int, float]:
    """The loss of each update, in bits."""
    lines = map(json.loads, (folder / _FIGURES).read_text().splitlines())
    found = [(step, figures["train_inner/loss"]) for step, figures in lines if "train_inner/loss" in figures]
    assert len(dict(found)) == len(found), "no update is made twice"
    return dict(found)


def require_same_curve(one: Path, other: Path) -> None:
    """Compare the losses of all twenty updates of two runs."""
    curves = [loss_curve(folder) for folder in (one, other)]
    assert sorted(curves[0]) == list(range(1, 21))
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[0][20] < curves[0][1] - 0.1, "there is something to follow"
