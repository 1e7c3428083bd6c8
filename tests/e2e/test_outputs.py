"""Outputs that are written before they are reported, and folders that two commands want at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_commands import Forks

from fairseq.runtime.files import locked
from fairseq_cli import eval_lm, preprocess, train
from fairseq_cli.entry import run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = (("eval_lm-test", "json"), ("scores-test", "npz"), ("eval_lm-test", "json.run.json"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR"}


def evaluation(data_bin: Path, trained: Path) -> list[str]:
    return [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *"--cpu --max-tokens 256".split()]


@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [(">&-", 2, "standard output was lost"), ("| true", 141, ""), ("> /dev/full", 2, "No space left on device")],
)
def test_a_lost_standard_output_loses_no_file(
    data_bin: Path, trained: Path, tmp_path: Path, ending: str, status: int, message: str
) -> None:
    if "/dev/full" in ending and not Path("/dev/full").exists():
        pytest.skip("no full disk here")
    words = [sys.executable, str(ROOT / "eval_lm.py"), *evaluation(data_bin, trained), "--eval-file", "e.json"]
    line = f"set -o pipefail; {shlex.join(words)} {ending}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert json.loads((tmp_path / "e.json").read_text())["perplexity"] > 1
    assert (tmp_path / "e.json.run.json").exists()
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_an_output_in_a_missing_folder_is_written(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "no" / "such" / "e.json"
    eval_lm.main([*evaluation(data_bin, trained), "--eval-file", str(out)])
    assert out.exists()


def test_each_shard_writes_its_own_results(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    for shard in range(2):
        words = ["--num-shards", "2", "--shard-id", str(shard), "--results-path", str(tmp_path)]
        eval_lm.main([*evaluation(data_bin, trained), *words])
    names = {f"{kind}.shard{shard}of2.{end}" for shard in range(2) for kind, end in RESULTS}
    assert names <= {path.name for path in tmp_path.iterdir()}
    shares = [json.loads((tmp_path / f"eval_lm-test.shard{shard}of2.json").read_text()) for shard in range(2)]
    assert all(share["num_tokens"] for share in shares)


def test_an_interrupted_import_is_one_line(tmp_path: Path) -> None:
    """The signal comes from within, at the first import of a module of ours that follows the package."""
    code = (
        "import sys, os, signal\n"
        "sys.addaudithook(lambda event, args: os.kill(os.getpid(), signal.SIGINT)"
        " if event == 'import' and args[0] == 'fairseq.options' else None)\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['eval_lm.py', 'x']\n"
        "import fairseq_cli.eval_lm\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "eval_lm.py: interrupted\n")


def refused(program: str, main, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused prints."""
    with pytest.raises(SystemExit) as ended:
        run(program, main, words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_second_training_into_a_folder_is_refused(
    data_bin: Path, forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--arch transformer_lm --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 --decoder-layers 1 --cpu"
    words = [str(data_bin), "--save-dir", str(tmp_path / "m"), *small.split(), "--decoder-attention-heads", "1"]
    words += "--optimizer adam --lr 0.01 --max-tokens 256 --tokens-per-sample 32 --max-update 2000".split()
    words += ["--save-interval-updates", "5", "--no-epoch-checkpoints", "--disable-validation"]
    first = forks.start("train.py", *words)
    deadline = time.monotonic() + 120
    while not (tmp_path / "m" / "checkpoint_last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    message = refused("train.py", train.main, words, capsys)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (
        f"another process is writing the checkpoints of --save-dir '{tmp_path / 'm'}' (process {first.pid} on"
        in message
    )
    words[words.index("2000")] = "6"
    train.main(words)  # the lock of a killed run holds nobody up
    assert not (tmp_path / "m" / ".train.lock").exists()


def test_a_second_preprocessing_into_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").write_text("a b c\n" * 20)
    words = ["--only-source", "--trainpref", str(tmp_path / "t"), "--destdir", str(tmp_path / "d")]
    (tmp_path / "d").mkdir()
    with locked(tmp_path / "d" / ".preprocess.lock", "it"):
        message = refused("preprocess.py", preprocess.main, words, capsys)
    assert "another process is writing the data of --destdir" in message
    assert list((tmp_path / "d").iterdir()) == []
    preprocess.main(words)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "dict.txt",
        "train.bin",
        "train.idx",
        "train.sums.json",
    ]


def test_a_store_of_another_model_is_reported(
    data_bin: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ["--gen-subset", "valid", "--save-knnlm-dstore", "--dstore-mmap", str(tmp_path / "s")]
    words = evaluation(data_bin, trained)
    eval_lm.main([*words, *saving])
    knn = ["--gen-subset", "valid", "--knnlm", "--dstore-filename", str(tmp_path / "s"), "--k", "4", "--lmbda", "0.2"]
    eval_lm.main([*words, *knn])
    assert "another model" not in caplog.text
    other = tmp_path / "other.pt"
    other.write_bytes((trained / "checkpoint_best.pt").read_bytes())
    metadata = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(metadata | {"model_digest": "sha256:" + "0" * 64}))
    words[2] = str(other)
    eval_lm.main([*words, *knn])
    assert f"datastore '{tmp_path / 's'}' was saved by another model (digest 000000000000)" in caplog.text
    assert "was saved by another model" in refused("eval_lm.py", eval_lm.main, [*words, *knn, "--strict-model"], capsys)
