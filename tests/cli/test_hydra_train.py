"""fairseq-hydra-train: every flag of train.py has a key, and a tree trains as the flags that mean the same."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_MODEL
from omegaconf import OmegaConf

from fairseq import options
from fairseq.option_tree import CHOSEN, FIXED, names_of, plain_tree, section_of, tree_of, words_of
from fairseq_cli import hydra_train, train

NO_SETTINGS = {"task", "arch", "criterion", "optimizer", "lr_scheduler", "print_yaml"}  # names of parts, and a report


def test_every_flag_of_training_has_a_key():
    keys = {key for section in FIXED for key in section_of(section).fields}
    keys |= {key for section in CHOSEN for name in names_of(section) for key in section_of(section, name).fields}
    assert "max_tokens" in keys
    for name in names_of("task"):
        for arch in ("transformer_lm", "transformer"):
            given = {field.name for part in flags_of(name, arch) for field in dataclasses.fields(part)}
            assert given - keys <= NO_SETTINGS


def flags_of(task, arch, monkeypatch=None):
    """The configs that train.py makes its flags of."""
    found = []
    original = options.FlagParser.add_config

    def noting(self, config):
        found.append(config)
        return original(self, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options.FlagParser, "add_config", noting)
        options.parse_train(["data", "--task", task, "--arch", arch])
    return found


@pytest.mark.parametrize("section", CHOSEN)
def test_a_section_as_it_is_gives_no_flags(section):
    for name in names_of(section):
        tree = {key: value for key, value in plain_tree(section, name).items() if value != "???"}
        words = words_of({section: tree})
        assert all(
            word.startswith(("--task=", "--arch=", "--criterion=", "--optimizer=", "--lr-scheduler=")) for word in words
        )
        assert any(word.endswith(f"={name}") for word in words)


PARTS = ("--task", "--arch", "--criterion", "--optimizer", "--lr-scheduler")
FLAGS = [
    ["data", "--lr", "0.1,0.2", "--adam-betas", "(0.5, 0.9)", "--optimizer", "adam", "--max-update", "3"],
    ["data", "--arch", "transformer_lm_wiki103", "--adaptive-softmax-cutoff", "10,20", "--decoder-layers", "3"],
    ["a:b", "--task", "translation", "--arch", "transformer", "--source-lang", "de", "--share-all-embeddings"],
    ["data", "--criterion", "trime_loss", "--update-freq", "2", "--fp16", "--keep-order", "--clip-norm", "-1"],
    ["data", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4", "--save-dir", "my dir", "--seed", "7"],
]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_become_a_tree_and_the_tree_the_same_flags(flags):
    settings = options.parse_train(flags)
    tree = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(tree_of(settings)))))
    again = options.parse_train(words_of(tree))
    chosen = {name: value for name, value in settings.given.items() if name not in NO_SETTINGS}
    assert {name: again.given[name] for name in chosen} == chosen
    assert again.chosen == settings.chosen
    assert again.given.keys() - settings.given.keys() <= NO_SETTINGS


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"task": {"dta": "x"}}, "unknown key task.dta of language_modeling .did you mean 'data'"),
        ({"tsak": {"data": "x"}}, "unknown section tsak .did you mean 'task'"),
        ({"dataset": {"lr": 0.1}}, "unknown key dataset.lr; it belongs to optimization.lr"),
        ({"task": {"data": "???"}}, "task.data is ... and must be given"),
        ({"task": "language_modeling"}, "task: 'language_modeling' is no section"),
        ({"common": {"fp16": "maybe"}}, "common.fp16: 'maybe' is neither true nor false"),
        ({"optimizer": {"_name": "adm"}}, "optimizer .*did you mean 'adam'"),
        ({"checkpoint": {"save_dir": None}}, "checkpoint.save_dir: null; its default is 'checkpoints'"),
    ],
)
def test_a_mistake_in_a_tree_is_named_with_its_path(tree, message):
    with pytest.raises(ValueError, match=message):
        words_of(tree)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.dta=x"], "unknown key task.dta"),
        (["modle=transformer"], "unknown section modle .did you mean 'model'"),
        (
            ["model=transformer_lm,transformer_lm_bi"],
            "unknown name transformer_lm_bi .did you mean 'transformer_lm_big'",
        ),
        (["task.data=["], "not an override"),
    ],
)
def test_a_mistake_in_an_override_is_named_before_anything_is_composed(words, message):
    with pytest.raises(ValueError, match=message):
        hydra_train.check_overrides(hydra_train.read_overrides(words))
    right = ["task.data=x", "hydra.run.dir=y", "+more=1", "model=transformer_lm_gpt", "common.seed=1,2"]
    hydra_train.check_overrides(hydra_train.read_overrides(right))


ORDERS = [
    ["task.data=x", "model=transformer_lm_gpt", "--cfg", "job"],
    ["task.data=x", "--cfg", "job", "model=transformer_lm_gpt"],
]


@pytest.fixture
def composed(monkeypatch, capsys):
    """Run the command in this process; returns what it printed."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(*words):
        hydra_train.main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def test_flags_of_hydra_stand_between_and_after_overrides(composed):
    told = [composed(*words) for words in ORDERS]
    assert told == told[:1] * 2
    assert OmegaConf.create(told[0]).model["_name"] == "transformer_lm_gpt"


def test_the_task_is_that_of_the_model_as_with_flags(composed):
    words = ["task.data=x", "model=transformer_lm_gnn", "--cfg", "job"]
    made = OmegaConf.create(composed(*words, "task.graph_stores=y"))
    assert (made.task["_name"], made.task.graph_stores) == ("graph_language_modeling", "y")
    assert OmegaConf.create(composed(*words, "task=language_modeling")).task["_name"] == "language_modeling"
    file = {"task": {"data": "x", "graph_stores": "y"}, "model": {"_name": "transformer_lm_gnn"}}
    flags = ["x", "--arch=transformer_lm_gnn", "--graph-stores=y"]
    assert options.parse_train(words_of(file)).chosen == options.parse_train(flags).chosen
    assert tree_of(options.parse_train(words_of(file))) == tree_of(options.parse_train(flags))
    with pytest.raises(ValueError, match="language_modeling and graph_language_modeling; give a sweep for each task"):
        composed("task.data=x", "model=transformer_lm,transformer_lm_gnn", "--multirun")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir", "nodir", "--config-name", "x"], r"config directory '.*nodir' not found"),
        (["--config-dir", ".", "--config-name", "nofile"], r"Cannot find primary config 'nofile'\. Check [^\n]*"),
        (["--config-dir", ".", "--config-name", "broken"], "while parsing a flow mapping"),
        (["task.data=x", "optimization.max_update"], "not an override: .*'optimization.max_update'\nmissing EQUAL"),
        (["task.data=x", "--print-yaml"], "unrecognized arguments: --print-yaml; --help shows Hydra's flags"),
    ],
)
def test_an_error_of_hydra_is_one_of_the_command(words, message, composed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: {data: x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        composed(*words)
    assert capsys.readouterr() == ("", "")


def test_a_job_of_a_sweep_is_not_taken_for_one_with_other_settings(tmp_path):
    words = ["x", "--max-tokens=100", "--lr=0.003", "--max-update=4"]
    save_dir = tmp_path / "job" / "checkpoints"
    hydra_train.note_job(tmp_path / "job", save_dir, words)
    hydra_train.note_job(tmp_path / "job", save_dir, [*words[:3], "--max-update=9", "--log-interval=2", "--no-save"])
    for word, message in (
        (
            "--lr=0.5",
            r"job holds a job with optimization.lr \[0.003\], now it is \[0.5\]; name another hydra.sweep.dir",
        ),
        ("--seed=3", "common.seed the default, now it is 3"),
        ("--arch=transformer_lm_gpt", "model._name transformer_lm, now it is transformer_lm_gpt"),
        ("--max-tokens=99", "dataset.max_tokens 100, now it is 99"),
    ):
        with pytest.raises(ValueError, match=message):
            hydra_train.note_job(tmp_path / "job", save_dir, [*words, word])
    hydra_train.note_job(tmp_path / "job", save_dir, words)


def test_a_job_that_an_earlier_release_finished_is_known_by_its_manifest(tmp_path):
    (tmp_path / "train.run.json").write_text(json.dumps({"command": "fairseq-hydra-train x --lr=0.1"}))
    with pytest.raises(ValueError, match=r"optimization.lr \[0.1\], now it is \[0.2\]"):
        hydra_train.note_job(tmp_path, tmp_path, ["x", "--lr=0.2"])


def call(*words, cwd):
    line = [sys.executable, "-m", "fairseq_cli.hydra_train", *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_sweep_trains_as_the_flags_do_and_resumes(data_bin: Path, tmp_path: Path, composed, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [str(data_bin), "--max-update", "6", *map(str, TINY_MODEL)]
    train.main([*flags, "--print-yaml"])
    (tmp_path / "tiny.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    sweep = ["--config-dir", tmp_path, "--config-name", "tiny", "--multirun"]
    sweep += ["++common.seed=1,2", "++optimization.clip_norm=0.1,0.5"]
    composed(*sweep)
    for seed in (1, 2):
        for clip in (0.1, 0.5):
            own = tmp_path / "flags" / f"{seed}-{clip}"
            job = tmp_path / "multirun" / f"++common.seed={seed},++optimization.clip_norm={clip}"
            train.main([*flags, "--seed", str(seed), "--clip-norm", str(clip), "--save-dir", str(own)])
            one, two = (
                torch.load(folder / "checkpoint_last.pt", weights_only=True) for folder in (own, job / "checkpoints")
            )
            assert one["model"].keys() == two["model"].keys()
            assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "multirun").rglob("*.pt")}
    assert len(made) >= 4
    composed(*sweep)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "multirun").rglob("*.pt")} == made


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    told = call("task.dta=x", cwd=tmp_path)
    assert told.returncode == 2
    message = "unknown key task.dta of language_modeling (did you mean 'data'?)"
    assert told.stderr == f"fairseq-hydra-train: error: {message}\n"
    (tmp_path / "mine.yaml").write_text("task: {data: x}\ndataset: {max_tokesn: 100}\n", encoding="utf-8")
    told = call("--config-dir", tmp_path, "--config-name", "mine", cwd=tmp_path)
    assert told.returncode == 2
    assert "unknown key dataset.max_tokesn (did you mean 'max_tokens'?)" in told.stderr.splitlines()[-1]
