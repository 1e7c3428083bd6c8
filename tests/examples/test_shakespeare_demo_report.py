"""The demo's report on figures made up here: order of rows, sums over splits, table, JSON and picture."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT: dict[str, Any] = runpy.run_path(str(ROOT / "train_scripts" / "shakespeare_demo_report.py"))


def figures(folder: Path, name: str, perplexity: float, tokens: int, seconds: float) -> None:
    told = {"perplexity": perplexity, "num_tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    (folder / f"{name}.json").write_text(json.dumps(told))


def sweep(folder: Path, best: float) -> None:
    """Shares 0.1 and 0.25, chosen on valid and tried on test, as fairseq-knn-sweep writes them."""
    perplexity = {0.1: 95.0, 0.25: 90.5}
    told = {
        "tuned_on": "valid",
        "settings": [{"k": 8, "lmbda": share, "perplexity": perplexity[share]} for share in (0.25, 0.1)],
        "best": {"k": 8, "lmbda": best, "perplexity": perplexity[best]},
        "reported_on": "test",
        "reported": {"k": 8, "lmbda": best, "perplexity": 105.0},
    }
    (folder / "knn.sweep.json").write_text(json.dumps(told))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    figures(tmp_path, "knn.valid", 93.0, 100, 4.0)
    figures(tmp_path, "knn.test", 106.0, 300, 6.0)
    sweep(tmp_path, best=0.25)
    figures(tmp_path, "plain.valid", 100.0, 100, 1.0)
    figures(tmp_path, "plain.test", 110.0, 300, 1.0)
    (tmp_path / "dstore.json").write_text("{}")  # other JSON files are not figures
    (tmp_path / "train.seconds").write_text("120\n")
    (tmp_path / "plain.valid.seconds").write_text("7\n")
    (tmp_path / "prediction.json").write_text(json.dumps({"seconds": 130.4}))
    return tmp_path


def test_rows_are_ordered_by_weight_and_sum_their_splits(folder: Path) -> None:
    rows = REPORT["read_rows"](folder)
    assert [row.weight for row in rows] == [0.0, 0.1, 0.25]
    assert rows[0].perplexity == {"valid": 100.0, "test": 110.0}
    assert (rows[0].seconds, rows[0].tokens_per_second) == (2.0, 200.0)


@pytest.mark.parametrize(("best", "other"), [(0.25, 0.1), (0.1, 0.25)])
def test_the_best_share_has_the_search_and_the_figure_on_test(folder: Path, best: float, other: float) -> None:
    sweep(folder, best)
    rows = {row.weight: row for row in REPORT["read_rows"](folder)}
    valid = {0.1: 95.0, 0.25: 90.5}
    assert rows[best].perplexity == {"valid": valid[best], "test": 105.0}
    assert (rows[best].seconds, rows[best].tokens_per_second) == (10.0, 40.0)
    assert rows[other].perplexity == {"valid": valid[other]}
    assert (rows[other].seconds, rows[other].tokens_per_second) == (None, None)


def test_trimes_rows_come_last_by_their_memory(folder: Path) -> None:
    for name in ("external", "local", "long"):
        figures(folder, f"{name}.valid", 80.0, 100, 1.0)
    methods = [row.method for row in REPORT["read_rows"](folder)]
    assert methods[0] == "language model alone"
    assert methods[3:] == ["TRIME, local memory", "TRIME, local and long-term", "TRIME, external as well"]


def test_the_table_is_markdown_with_a_dash_for_what_is_missing(folder: Path) -> None:
    lines = REPORT["as_table"](REPORT["read_rows"](folder)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["method", "valid perplexity", "test perplexity", "seconds", "tokens/s"]
    assert cells[2] == ["language model alone", "100.00", "110.00", "2.0", "200"]
    assert cells[3] == ["kNN-LM, lambda 0.1", "95.00", "-", "-", "-"]
    assert cells[4] == ["kNN-LM, lambda 0.25", "90.50", "105.00", "10.0", "40"]
    assert len({len(line) for line in lines}) == 1


def test_the_report_leaves_json_and_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    REPORT["main"]([str(folder)])
    record = json.loads((folder / "results.json").read_text())
    assert record["stage_seconds"] == {"plain.valid": 7, "train": 120}
    assert [row["method"] for row in record["rows"]][0] == "language model alone"
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "seconds: train 120, evaluation 7, all 127" in printed
    assert "| language model alone | 100.00" in printed


def test_the_time_is_printed_beside_the_prediction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    REPORT["main"]([str(folder), "--took", "141"])
    assert "this start took 141 s; predicted were 130 s\n" in capsys.readouterr().out
    record = json.loads((folder / "results.json").read_text())
    assert (record["wall_seconds"], record["prediction"]) == (141, {"seconds": 130.4})


def test_a_folder_without_figures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run train_scripts/shakespeare-demo"):
        REPORT["main"]([str(tmp_path)])
