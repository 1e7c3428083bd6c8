"""fairseq-validate reports what validation within training reported."""

import json

import pytest

from fairseq.checkpoint_utils import load_checkpoint
from fairseq_cli import validate


def figures(caplog, *words):
    caplog.clear()
    validate.main([*map(str, words), "--cpu", "--log-format", "json"])
    return [(r.name, json.loads(r.message)) for r in caplog.records if r.message.startswith("{")]


def test_the_figures_are_those_of_training(trained, data_bin, caplog):
    caplog.set_level("INFO")
    path = trained / "checkpoint_last.pt"
    ((name, found),) = figures(caplog, data_bin, "--path", path)
    expected = load_checkpoint(str(path)).progress["figures"]
    assert name == "valid"
    assert found["valid_loss"] == pytest.approx(expected["loss"], abs=6e-4)
    assert found["valid_num_updates"] == expected["num_updates"]
    several = figures(caplog, data_bin, "--path", path, "--valid-subset", "valid,test", "--max-valid-steps", 1)
    assert [name for name, _ in several] == ["valid", "test"]


def test_a_missing_checkpoint_is_named(data_bin):
    with pytest.raises(ValueError, match="--path names no checkpoint"):
        validate.main([str(data_bin)])


def test_an_overridden_limit_is_one_of_the_data_too(trained, data_bin):
    words = ["--path", str(trained / "checkpoint_last.pt"), "--cpu", "--model-overrides", "{'max_target_positions': 4}"]
    with pytest.raises(ValueError, match="the model reads at most 4"):
        validate.main([str(data_bin), *words])
