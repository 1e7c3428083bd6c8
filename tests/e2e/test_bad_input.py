"""A user's mistakes: one line with what, where and the way out, status 2, no traceback, and nothing half done.

The commands run in this process (importing PyTorch takes seconds), through the same ``run`` as the scripts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL

from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq_cli import build_dstore, eval_lm, preprocess, train
from fairseq_cli.entry import run

pytestmark = pytest.mark.slow

MAINS = {"train.py": train, "eval_lm.py": eval_lm, "build_dstore.py": build_dstore, "preprocess.py": preprocess}
EVAL = ("--cpu", "--gen-subset", "valid", "--max-tokens", "64", "--context-window", "16")
KNN = ("--knnlm", "--lmbda", "0.3", "--k", "32")
FILE = shlex.quote(__file__)

Told = Callable[..., str]


def mistakes(messages: dict[str, str]) -> pytest.MarkDecorator:
    """A case for each text of words -> what is told about them."""
    cases = [pytest.param(shlex.split(text), message, id=text) for text, message in messages.items()]
    return pytest.mark.parametrize(("words", "message"), cases)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a command that must fail; returns its one line."""

    def fails(program: str, *words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(program, MAINS[program].main, [str(word) for word in words])
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{program}: error: "), lines
        return lines[0]

    return fails


@pytest.fixture
def evaluated(told: Told, data_bin: Path, trained: Path) -> Told:
    """As told, for eval_lm.py on the corpus; ``data`` and ``path`` replace folder and checkpoint."""

    def fails(*words: object, data: object = data_bin, path: object = trained / "checkpoint_best.pt") -> str:
        return told("eval_lm.py", data, "--path", path, *EVAL, *words)

    return fails


@pytest.fixture
def training(told: Told, data_bin: Path, tmp_path: Path) -> Told:
    """As told, for train.py; of a flag given twice the last one counts."""

    def fails(*words: object, data: object = data_bin) -> str:
        return told("train.py", data, "--save-dir", tmp_path / "run", "--max-update", 5, *TINY_MODEL, *words)

    return fails


@pytest.fixture(scope="module")
def store(trained: Path, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a datastore of the training text, with an index at the same prefix."""
    prefix = tmp_path_factory.mktemp("store") / "d"
    saving = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", str(prefix)]
    eval_lm.main([str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *EVAL, *saving])
    build_dstore.main(["--dstore_mmap", str(prefix), "--faiss_index", str(prefix), "--index", "flat"])
    return prefix


@pytest.fixture
def folder(data_bin: Path, tmp_path: Path) -> Path:
    """A data folder to damage."""
    return Path(shutil.copytree(data_bin, tmp_path / "data"))


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room: whatever is to reach it fails, without a name as the system's own error has none."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


class Malicious:
    """Pickles as a call of os.system."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("valid.bin", b"12345", "valid.bin has 5 bytes, its .idx says"),
        ("valid.idx", b"", "valid.idx is not a fairseq mmap index"),
        ("valid.idx", b"MMIDIDX\0\0" + bytes([1, *7 * [0], 8, 9, *7 * [0]]), "9 sentences need 134"),
        ("valid.idx", None, "split 'valid' is not whole"),
        ("dict.txt", None, "holds no dict.txt"),
        ("dict.txt", b"", "dict.txt holds no symbol"),
        ("dict.txt", b"w1 5\n\xff\n", "dict.txt, line 2: not utf-8 text"),
        ("dict.txt", b"w1 5\n", "dict.txt has 5 types; the text was binarised with another dictionary"),
    ],
)
def test_damaged_data(evaluated: Told, folder: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert message in evaluated(data=folder)


def test_another_dictionary(evaluated: Told, training: Told, trained: Path, folder: Path, store: Path) -> None:
    path = folder / "dict.txt"
    text = path.read_text()
    path.write_text(text + "extra 1\n")
    assert "trained with a dictionary of 80 types, the data's has 81" in evaluated(data=folder)
    path.write_text(text.replace("w1 ", "x1 "))
    assert "checkpoint_best.pt: the checkpoint was trained with another dictionary" in evaluated(data=folder)
    assert "trained with another dictionary" in training("--restore-file", trained / "checkpoint_last.pt", data=folder)
    about = json.loads(Path(f"{store}.json").read_text())
    for end in ("_keys.npy", "_vals.npy"):
        os.link(f"{store}{end}", folder / f"d{end}")
    (folder / "d.json").write_text(json.dumps(about | {"dictionary_digest": "0" * 64}))
    line = evaluated(*KNN, "--dstore-filename", folder / "d")
    assert "saved with another dictionary (80 types, digest 000000000000)" in line


def test_an_empty_text(training: Told, told: Told, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    line = told("preprocess.py", "--only-source", "--trainpref", empty, "--destdir", tmp_path / "out")
    assert f"{empty}: no words" in line
    preprocess.main(
        ["--only-source", "--srcdict", str(folder / "dict.txt"), "--testpref", str(empty), "--destdir", str(folder)]
    )
    for end in (".bin", ".idx"):
        shutil.copy(folder / f"test{end}", folder / f"train{end}")
    assert "split 'train' is empty" in training(data=folder)


@pytest.mark.parametrize("flag", ["--path", "--restore-file", "--finetune-from-model"])
@pytest.mark.parametrize("old_format", [False, True])
def test_no_code_of_a_checkpoint_runs(
    evaluated: Told, training: Told, tmp_path: Path, flag: str, old_format: bool
) -> None:
    path = tmp_path / "evil.pt"
    content = {"model": {}, "args": Malicious(tmp_path / "harmed")}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    line = evaluated(path=path) if flag == "--path" else training(flag, path)
    assert f"{path} cannot be read as a checkpoint: it asks to run {os.system.__module__}.system" in line
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: good[: len(good) // 2], "is damaged, cut short, or another kind of file"),
        (lambda good: b"", "is damaged, cut short, or another kind of file"),
        (lambda good: b"hello\n", "is damaged, cut short, or another kind of file"),
        (None, "is a folder; name one of its checkpoints"),
    ],
)
def test_damaged_checkpoints(
    evaluated: Told, trained: Path, tmp_path: Path, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    path = tmp_path / "x.pt"
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage((trained / "checkpoint_best.pt").read_bytes()))
    assert message in evaluated(path=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 3}, "its settings are no groups of settings"),
        ({"progress": None, "version": 9}, "has format version 9, this program reads 1"),
        ({"model": {}}, "holds no transformer language model"),
    ],
)
def test_checkpoints_with_other_content(
    evaluated: Told, trained: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = torch.load(trained / "checkpoint_best.pt", weights_only=True)
    torch.save(content | changes, tmp_path / "x.pt")
    assert message in evaluated(path=tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{'decoder_layers': 3}", "the model has a weight decoder.layers.2.self_attn.k_proj.weight (16, 16)"),
        ("{'decoder_layers': 'x'}", "--decoder-layers 'x' is a str, int is needed"),
        ("{'dropout': 'x'}", "--dropout 'x' is a str, float is needed"),
        ("{3: 4}", "has keys that are no names"),
        ("__import__('os').getpid()", "is not a literal"),
        ("{'knn_keytype': 'nope'}", "unknown --knn-keytype 'nope'"),
    ],
)
def test_overrides(evaluated: Told, overrides: str, message: str) -> None:
    assert message in evaluated("--model-overrides", overrides)


@mistakes(
    {
        "--k 0": "--k must be at least 1, got 0",
        "--k 5000": "--k 5000 is larger than the datastore, which has",
        "--lmbda 1.2": "--lmbda 1.2 is not in [0, 1]",
        "--lmbda -0.1": "--lmbda -0.1 is not in [0, 1]",
        "--softmax-temp 0": "--softmax-temp must be at least 1e-06, got 0.0",
        "--probe 0": "--probe must be at least 1, got 0",
        "--save-knnlm-dstore --dstore-mmap x": "--knnlm and --save-knnlm-dstore exclude each other",
        "--dstore-size 7": "--dstore-size says 7",
        "--dstore-fp16": "holds float32 keys and --dstore-fp16 was given",
        "--knn-keytype model_output": "holds keys of last_ffn_input; --knn-keytype says model_output: give",
        "--knn-keytype nope": "argument --knn-keytype: 'nope' is none of last_ffn_input",
        "--indexfile nowhere": "no index at 'nowhere'",
        "--indexfile {store} --faiss-metric-type ip": "d.l2 is there: give --faiss-metric-type l2",
        "--dstore-filename nowhere": "no datastore at 'nowhere'",
    }
)
def test_neighbours(evaluated: Told, store: Path, words: list[str], message: str) -> None:
    given = [word.format(store=store) for word in words]
    assert message in evaluated(*KNN, "--dstore-filename", store, *given)


def test_damaged_stores_and_indexes(evaluated: Told, told: Told, store: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.l2"
    broken.write_bytes(Path(f"{store}.l2").read_bytes()[:-20])
    named = (*KNN, "--dstore-filename", store)
    assert "is not a whole faiss index: cut short" in evaluated(*named, "--indexfile", tmp_path / "broken")
    killed = DatastoreWriter(tmp_path / "killed", 500, 16)
    killed.append(np.ones((200, 16)), np.ones(200, dtype=np.int64))
    killed.checkpoint()
    killed.close()
    assert "is not complete (200 of 500 rows)" in evaluated(*KNN, "--dstore-filename", tmp_path / "killed")
    assert "is not complete" in told("build_dstore.py", "--dstore_mmap", tmp_path / "killed", "--faiss_index", "x")
    np.ones((50, 16), np.float32).tofile(tmp_path / "old_keys.npy")
    words = (*KNN, "--dstore-filename", tmp_path / "old", "--dstore-size")
    assert "old_vals.npy does not; copy it too" in evaluated(*words, 50)
    np.full(50, 5).tofile(tmp_path / "old_vals.npy")
    assert "51 rows of 16 float32 values take 3264; at this width it holds 50 rows" in evaluated(*words, 51)
    assert "these are float32 keys: drop --dstore-fp16" in evaluated(*words, 50, "--dstore-fp16")


@mistakes(
    {
        "--dstore-filename d": "--dstore-filename d is read with --knnlm only",
        "--search-on ray": "--search-on ray is read with --knnlm only: give it too, or leave --search-on out",
        "--dstore-mmap d": "--dstore-mmap d is where --save-knnlm-dstore writes",
        "--num-shards 0": "--num-shards must be at least 1, got 0",
        "--num-workers -1": "--num-workers must be at least 0, got -1",
        "--max-target-positions 0": "--max-target-positions must be at least 1, got 0",
        "--num-shards 999 --shard-id 0": "nothing to score: of the 0 blocks in this part of valid none",
        "--eval-file /": "--eval-file / is a folder",
        f"--eval-file {FILE}/x": "accepts no new files",
    }
)
def test_evaluation_flags(evaluated: Told, words: list[str], message: str) -> None:
    assert message in evaluated(*words)


@mistakes(
    {
        "--arch transformer_lm_wiki130": "did you mean 'transformer_lm_wiki103'?",
        "--max-token 9": "unknown flag --max-token (did you mean '--max-tokens'?)",
        "--label-smoothing 0.1": "belongs to --criterion label_smoothed_cross_entropy, not to adaptive_loss",
        "--max-tokens abc": "argument --max-tokens: invalid int value: 'abc'",
        "--seed x": "argument --seed: invalid int value: 'x'",
        "--seed -1": "--seed must be at least 0, got -1",
        "--lr ''": "'' is not a comma-separated list of numbers",
        "--lr -1": "--lr must be finite and at least 0, got -1.0",
        "--adam-betas nonsense": "'nonsense' is not a comma-separated list of numbers",
        "--adam-betas (0.9,)": "--adam-betas needs two numbers",
        "--update-freq 0": "--update-freq must be at least 1, got 0",
        "--tokens-per-sample 0": "--tokens-per-sample must be at least 1, got 0",
        "--max-tokens 16": "has 32 tokens, more than --max-tokens 16",
        "--validate-interval 0": "--validate-interval must be at least 1, got 0",
        "--save-interval 0": "--save-interval must be at least 1, got 0",
        "--distributed-world-size 0": "--distributed-world-size must be at least 1, got 0",
        "--best-checkpoint-metric bleu": "--best-checkpoint-metric bleu: validation gives loss, ppl",
        "--finetune-from-model nowhere": "--finetune-from-model: no checkpoint at 'nowhere'",
        f"--save-dir {FILE}/x": "cannot be made: Not a directory; choose another folder",
    }
)
def test_training_flags(training: Told, words: list[str], message: str) -> None:
    assert message in training(*words)


def test_a_plug_in_that_fails(training: Told, tmp_path: Path) -> None:
    (tmp_path / "my_failing_plugin.py").write_text("1 / 0\n")
    line = training("--user-dir", tmp_path / "my_failing_plugin.py")
    assert "cannot be imported: ZeroDivisionError: division by zero; FAIRSEQ_TRACEBACK=1 shows where" in line


@mistakes(
    {
        "--decoder-layers 3": "is a model with --decoder-layers 2, the flags ask for 3",
        "--decoder-attention-heads 4": "is a model with --decoder-attention-heads 2, the flags ask for 4",
        "--knn-keytype separated_head": "holds other weights than the flags ask for",
        "--optimizer nag": "was trained with --optimizer adam, now it says nag: give adam, or --reset-optimizer",
        "--lr-scheduler fixed": "was trained with --lr-scheduler inverse_sqrt, now it says fixed",
        "--criterion trime_loss": "was trained with --criterion adaptive_loss, now it says trime_loss",
    }
)
def test_going_on_with_another_run(training: Told, trained: Path, words: list[str], message: str) -> None:
    assert message in training("--restore-file", trained / "checkpoint_last.pt", *words)


def test_starting_from_another_architecture(training: Told, trained: Path) -> None:
    path = trained / "checkpoint_best.pt"
    line = training("--finetune-from-model", path, "--decoder-layers", 3)
    assert f"{path}: the model has a weight decoder.layers.2" in line


@pytest.mark.usefixtures("no_room")
def test_a_full_disk(training: Told, evaluated: Told, told: Told, store: Path, tmp_path: Path) -> None:
    full = "no space left on the disk; free some and run the same command again"
    assert f"run/checkpoint1.pt: {full}" in training("--max-update", 0, "--max-epoch", 1)
    assert not (tmp_path / "run").exists()  # nothing was saved in it
    assert f"d_keys.npy.tmp: {full}" in evaluated("--save-knnlm-dstore", "--dstore-mmap", tmp_path / "d")
    assert f"x.json: {full}" in evaluated("--eval-file", tmp_path / "x.json")
    assert f"i.l2.trained: {full}" in told(
        *("build_dstore.py", "--dstore_mmap", store, "--faiss_index", tmp_path / "i", "--index", "flat")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"d_keys.npy.tmp", "d_vals.npy.tmp"}


@contextlib.contextmanager
def file_sizes_up_to(size: int) -> Iterator[None]:
    """Stands for a disk that gets full in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_store_goes_on_when_there_is_room_again(
    evaluated: Told, data_bin: Path, trained: Path, store: Path, tmp_path: Path
) -> None:
    words = ("--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "d")
    with file_sizes_up_to(40_000):
        line = evaluated(*words)
    assert f"{tmp_path / 'd_keys.npy.tmp'}: files may not grow so large here" in line
    eval_lm.main([*map(str, (data_bin, "--path", trained / "checkpoint_best.pt", *EVAL, *words))])
    assert (tmp_path / "d_keys.npy").read_bytes() == Path(f"{store}_keys.npy").read_bytes()


def test_an_index_whose_last_bytes_find_no_room_is_none(told: Told, store: Path, tmp_path: Path) -> None:
    """faiss's own writer drops what is left in its buffer and says nothing to the program."""
    words = ("--dstore_mmap", store, "--faiss_index", tmp_path / "i", "--index", "flat")
    with file_sizes_up_to(Path(f"{store}.l2").stat().st_size - 10):
        line = told("build_dstore.py", *words)
    assert f"{tmp_path / 'i.l2'}: files may not grow so large here" in line
    assert not (tmp_path / "i.l2").exists()
    build_dstore.main([str(word) for word in words])
    assert (tmp_path / "i.l2").read_bytes() == Path(f"{store}.l2").read_bytes()


def test_free_disk_is_looked_at_first(
    evaluated: Told, told: Told, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "has 1000 free" in evaluated("--save-knnlm-dstore", "--dstore-mmap", tmp_path / "d")
    words = ("--dstore_mmap", store, "--faiss_index", tmp_path / "i", "--index", "flat")
    assert "has 1000 free" in told("build_dstore.py", *words)
    assert not list(tmp_path.iterdir())


@mistakes(
    {
        "--trainpref nowhere.txt": "no such text file: nowhere.txt",
        f"--trainpref {FILE} --srcdict {FILE}": "line 1: expected 'symbol count'",
        f"--trainpref {FILE} --workers 0": "--workers must be at least 1, got 0",
        f"--trainpref {FILE} --destdir {FILE}/x": "cannot be written: Not a directory; choose another",
    }
)
def test_preprocessing(told: Told, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in told("preprocess.py", "--only-source", "--destdir", tmp_path / "out", *words)


def test_of_several_processes_the_first_prints(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit):
        run("preprocess.py", preprocess.main, ["--only-source", "--trainpref", "nowhere.txt"])
    assert capsys.readouterr().err == ""
    assert "process 1: no such text file: nowhere.txt" in caplog.text


@pytest.mark.parametrize("script", ["train.py", "eval_lm-trime.py"])
def test_another_distribution_of_the_same_name(tmp_path: Path, script: str) -> None:
    about = tmp_path / "fairseq-0.12.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fairseq\nVersion: 0.12.2\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: the distribution 'fairseq' 0.12.2 is installed beside")
    assert done.stderr.count("\n") == 1
