"""The demo's prediction: stages and costs agree with the script, chains are laid out as it runs them, JSON is left."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fairseq.memory.index.ops import kernel_cache

ROOT = Path(__file__).resolve().parents[2]
TIME: dict[str, Any] = runpy.run_path(str(ROOT / "train_scripts" / "shakespeare_demo_time.py"))
SPEED = TIME["Speed"](import_seconds=0.5, update_seconds=0.1)


def listed(folder: Path, **settings: str) -> list[str]:
    """What the script would still do, as it hands it over."""
    hidden = ("CHAIN", "JOBS", "VARIANTS", "UPDATES", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        ["bash", "train_scripts/shakespeare-demo.sh", str(folder)],
        cwd=ROOT,
        env=environment | {"LIST_STAGES": "1"} | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def seconds(name: str) -> float:
    cost = TIME["COSTS"][name]
    return float(0.5 * cost.imports + 0.1 * cost.updates)


def test_every_stage_of_the_demo_has_a_cost(tmp_path: Path) -> None:
    stages = TIME["read_stages"](line for line in listed(tmp_path) if not line.endswith(" data"))
    assert sorted(name for _, name in stages) == sorted(set(TIME["COSTS"]) - {"data"})
    assert [chain for chain, _ in stages] == sorted(
        (chain for chain, _ in stages), key=["external", "plain", "long", "local"].index
    )


def test_what_is_done_and_other_variants_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.run.json").touch()
    lines = [line for line in listed(tmp_path, VARIANTS="local") if not line.endswith(" data")]
    assert lines == ["local local.valid", "local local.test"]


def test_chains_are_laid_out_as_they_run() -> None:
    around = TIME["AROUND"].seconds(SPEED)
    stages = [
        ("-", "data"),
        ("external", "store"),
        ("plain", "knn.valid"),
        ("plain", "knn.test"),
        ("long", "long.valid"),
    ]
    alone, plain = seconds("data") + around, seconds("knn.valid") + seconds("knn.test")
    one = TIME["predict"](stages, SPEED, 1, 250)
    assert one == pytest.approx(alone + seconds("store") + plain + seconds("long.valid"))
    two = TIME["predict"](stages, SPEED, 2, 250)  # the third begins where the first core is free
    beside = [seconds("store"), plain]
    beside[beside.index(min(beside))] += seconds("long.valid")
    assert two == pytest.approx(alone + max(beside))
    assert TIME["predict"]([], SPEED, 2, 250) == pytest.approx(around)


def test_a_first_start_compiles_before_all_else() -> None:
    stages = [("plain", "knn.valid"), ("long", "long.valid")]
    costs = [TIME["BYTECODE"], TIME["KERNELS"]]
    first, later = (TIME["predict"](stages, SPEED, 2, 250, once) for once in (costs, []))
    assert first - later == pytest.approx(sum(cost.seconds(SPEED) for cost in costs))
    assert TIME["predict"]([], SPEED, 2, 250, costs) == TIME["predict"]([], SPEED, 2, 250)


def test_what_a_first_start_compiles_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_first = TIME["compiled_first"]
    bytecode, kernels = tmp_path / "package.pyc", tmp_path / "kernels"
    monkeypatch.setitem(compiled_first.__globals__, "cache_from_source", lambda _: bytecode)
    monkeypatch.setattr(kernel_cache, "cache_folder", lambda: kernels)
    assert compiled_first() == [TIME["BYTECODE"], TIME["KERNELS"]]
    kernels.mkdir()
    bytecode.touch()
    assert compiled_first() == [TIME["KERNELS"]]
    (kernels / "one").touch()
    assert compiled_first() == []


def test_training_grows_with_its_updates() -> None:
    cost = TIME["COSTS"]["plain-train"]
    first, second = (TIME["predict"]([("plain", "plain-train")], SPEED, 1, updates) for updates in (250, 1000))
    assert second - first == pytest.approx(3 * 0.1 * cost.updates)


def test_a_stage_without_a_cost_is_an_error() -> None:
    with pytest.raises(ValueError, match="stage tea is not in COSTS"):
        TIME["read_stages"](["plain tea"])


def test_the_machine_is_measured_and_the_prediction_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("- data\nplain plain-train\nlong long-train\n"))
    TIME["main"]([str(tmp_path), "--side-by-side", "4", "--threads", "1", "--updates", "10"])
    printed = capsys.readouterr().out
    assert printed.startswith("This takes about ")
    assert printed.endswith(" on this machine, and the download: 3 stages to do, 2 at once\n")
    kept = json.loads((tmp_path / "prediction.json").read_text())
    assert kept["import_seconds"] > 0
    assert kept["update_seconds"] > 0
    speed = TIME["Speed"](kept["import_seconds"], kept["update_seconds"])
    stages = [("-", "data"), ("plain", "plain-train"), ("long", "long-train")]
    assert kept["seconds"] == pytest.approx(TIME["predict"](stages, speed, 2, 10, TIME["compiled_first"]()))
