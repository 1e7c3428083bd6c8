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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    figures(tmp_path, "knn-0.25.valid", 90.5, 100, 4.0)
    figures(tmp_path, "knn-0.1.valid", 95.0, 100, 2.0)
    figures(tmp_path, "knn-0.1.test", 105.0, 300, 2.0)
    figures(tmp_path, "plain.valid", 100.0, 100, 1.0)
    figures(tmp_path, "plain.test", 110.0, 300, 1.0)
    (tmp_path / "dstore.json").write_text("{}")  # other JSON files are not figures
    (tmp_path / "train.seconds").write_text("120\n")
    (tmp_path / "plain.valid.seconds").write_text("7\n")
    return tmp_path


def test_rows_are_ordered_by_weight_and_sum_their_splits(folder: Path) -> None:
    rows = REPORT["read_rows"](folder)
    assert [row.weight for row in rows] == [0.0, 0.1, 0.25]
    assert [row.tokens_per_second for row in rows] == [200.0, 100.0, 25.0]
    assert rows[1].perplexity == {"valid": 95.0, "test": 105.0}
    assert rows[2].perplexity == {"valid": 90.5}


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
    assert cells[4] == ["kNN-LM, lambda 0.25", "90.50", "-", "4.0", "25"]
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


def test_the_best_weight_is_chosen_on_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    REPORT["main"]([str(folder), "--best-weight"])
    assert capsys.readouterr().out == "0.25\n"


def test_a_folder_without_figures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run train_scripts/shakespeare-demo"):
        REPORT["main"]([str(tmp_path)])
