"""Progress lines as scripts expect them, and trackers on request."""

import io
import json
import logging
import sys

import pytest

from fairseq.config import FlagParser, build
from fairseq.runtime.config import CommonConfig
from fairseq.training.progress import Progress, copy_log_to_file

INNER = {"loss": 13.6431, "ppl": 12790.2, "wps": 3941.83, "num_updates": 20, "lr": 0.0012, "wall": 11.2}
VALID = {"loss": 8.1724, "ppl": 288.3941, "wps": 0.0, "num_updates": 205, "best_loss": 8.1724}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [(record.name, record.getMessage()) for record in caplog.records]


def run(config, updates=205, done=0, **more):
    """An epoch with a validation; returns how often figures were asked for."""
    asked = []
    progress = Progress(config, **more)
    with progress.epoch(1, total=205, done=done) as bar:
        for update in range(done, updates):
            bar.step(lambda update=update: asked.append(update + 1) or INNER)
    progress.end_of_epoch(1, INNER)
    progress.validated("valid", 1, VALID)
    progress.close()
    return asked


def test_simple_lines_look_as_in_fairseq(lines):
    asked = run(CommonConfig(log_format="simple", log_interval=20), updates=39)
    assert asked == [20]
    figures = "loss 13.643 | ppl 12790.20 | wps 3941.8 | num_updates 20 | lr 0.0012 | wall 11"
    assert lines() == [
        (
            "train_inner",
            "epoch 001:     20 / 205 loss=13.643, ppl=12790.20, wps=3941.8, num_updates=20, lr=0.0012, wall=11",
        ),
        ("fairseq.training.progress", "end of epoch 1 (average epoch stats below)"),
        ("train", f"epoch 001 | {figures}"),
        (
            "valid",
            "epoch 001 | valid on 'valid' subset | loss 8.172 | ppl 288.39 | wps 0 | num_updates 205 | best_loss 8.172",
        ),
    ]


def test_a_continued_epoch_counts_on(lines):
    assert run(CommonConfig(log_format="simple", log_interval=20), done=30, updates=61) == [40, 60]
    assert lines()[0][1].startswith("epoch 001:     40 / 205 ")


def test_json_lines_are_json(lines):
    run(CommonConfig(log_format="json", log_interval=41), updates=41)
    inner, train, valid = (json.loads(line) for _, line in lines())
    assert (inner["epoch"], inner["update"], inner["loss"], inner["num_updates"]) == (1, 0.2, 13.643, 20)
    assert (train["epoch"], train["train_loss"], train["train_ppl"], train["train_wall"]) == (1, 13.643, 12790.2, 11)
    assert (valid["epoch"], valid["valid_ppl"], valid["valid_best_loss"]) == (1, 288.39, 8.172)


def test_json_has_no_infinity(lines):
    Progress(CommonConfig(log_format="json")).validated("valid", 1, {"loss": float("nan"), "ppl": float("inf")})

    def refuse(word):
        raise AssertionError(word)

    line = json.loads(lines()[0][1], parse_constant=refuse)
    assert line == {"epoch": 1, "valid_loss": "nan", "valid_ppl": "inf"}


@pytest.mark.parametrize(("form", "enabled"), [("none", True), ("simple", False)])
def test_silence(lines, form, enabled):
    assert run(CommonConfig(log_format=form, log_interval=20), enabled=enabled) == []
    assert lines() == []


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_bar_on_a_terminal(lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    asked = run(CommonConfig(log_interval=100), done=10)
    assert asked == [100, 200]
    assert "epoch 001" in terminal.getvalue()
    assert "ppl=12790.20" in terminal.getvalue()
    assert [name for name, _ in lines()] == ["fairseq.training.progress", "train", "valid"]


@pytest.mark.parametrize(
    ("given", "on_terminal", "elsewhere"),
    [
        ({}, "tqdm", "simple"),
        ({"no_progress_bar": True}, "simple", "simple"),
        ({"no_progress_bar": True, "log_format": "json"}, "json", "json"),
        ({"log_format": "tqdm"}, "tqdm", "simple"),
    ],
)
def test_the_form_depends_on_flags_and_terminal(monkeypatch, given, on_terminal, elsewhere):
    config = CommonConfig(**given)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert config.form == elsewhere
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert config.form == on_terminal


def test_flags():
    parser = FlagParser("train.py", "")
    parser.add_config(CommonConfig)
    config = build(CommonConfig, parser.parse(["--no-progress-bar", "--log-interval", "20", "--log-format", "json"]))
    assert config == CommonConfig(no_progress_bar=True, log_interval=20, log_format="json")
    with pytest.raises(ValueError, match="--log-interval must be at least 1, got 0"):
        CommonConfig(log_interval=0)


def test_a_file_gets_a_copy_of_the_log(tmp_path, lines):
    assert copy_log_to_file(CommonConfig()) is None
    handler = copy_log_to_file(CommonConfig(log_file=str(tmp_path / "train.log")))
    try:
        run(CommonConfig(log_format="simple", log_interval=20), updates=20)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    written = (tmp_path / "train.log").read_text().splitlines()
    assert written[0].endswith("| INFO | train_inner | " + lines()[0][1])
    with pytest.raises(OSError, match="missing"):
        copy_log_to_file(CommonConfig(log_file=str(tmp_path / "missing" / "train.log")))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_figure_by_update(tmp_path, lines):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(CommonConfig(log_format="none", log_interval=20, tensorboard_logdir=str(tmp_path / "runs")), updates=20)
    assert lines() == []
    found = {}
    for tag in ("train_inner", "train", "valid"):
        events = EventAccumulator(str(tmp_path / "runs" / tag)).Reload()
        found[tag] = {
            name: [(e.step, round(e.value, 3)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
        }
    assert found["train_inner"]["loss"] == [(20, 13.643)]
    assert found["valid"]["best_loss"] == [(205, 8.172)]
    assert "num_updates" not in found["train"]


class FakeWandb:
    """What is used of the package wandb."""

    def __init__(self):
        self.logged, self.finished, self.project = [], False, None

    def init(self, project):
        self.project = project
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished = True


def test_wandb_gets_every_finite_figure_by_update(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    progress = Progress(CommonConfig(log_format="none", wandb_project="books"))
    progress.validated("valid", 1, VALID | {"ppl": float("inf")})
    progress.close()
    assert (wandb.project, wandb.finished) == ("books", True)
    assert wandb.logged == [(205, {"valid/loss": 8.1724, "valid/wps": 0.0, "valid/best_loss": 8.1724})]


@pytest.mark.parametrize(
    ("given", "module", "package"),
    [
        ({"wandb_project": "books"}, "wandb", "wandb"),
        ({"tensorboard_logdir": "runs"}, "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_tracker_is_told_at_the_start(monkeypatch, given, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # makes importing it fail
    with pytest.raises(ValueError, match=rf"needs the package {package}.*pip install 'fairseq-memory\[track\]'"):
        Progress(CommonConfig(**given))
    Progress(CommonConfig(**given), enabled=False)
