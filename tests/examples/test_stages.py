"""Stages and chains of the demo and the examples: what runs, what is skipped, and what ends the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("CHAIN", "JOBS", "LIST_STAGES", "OMP_NUM_THREADS")


def start(folder: Path, script: str, **settings: str) -> subprocess.Popen[str]:
    """Run lines of a script that has sourced stages.sh, in a process group of its own, as a terminal does."""
    lines = ["set -euo pipefail", f"out='{folder}'", f"source '{ROOT}/train_scripts/stages.sh'", script]
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    return subprocess.Popen(
        ["bash", "-c", "\n".join(lines)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, script: str, **settings: str) -> tuple[int, str, str]:
    """Status, standard output and standard error."""
    process = start(folder, script, **settings)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """False for a process that has ended, even if nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_runs_once_and_notes_its_seconds(tmp_path: Path) -> None:
    script = "stage make $out/made bash -c 'echo said; touch $0' $out/made"
    assert run(tmp_path, script) == (0, "== make\nsaid\n", "")
    assert int((tmp_path / "make.seconds").read_text()) in (0, 1)
    assert run(tmp_path, script) == (0, f"== make: done before ({tmp_path}/made)\n", "")


def test_a_chain_logs_what_its_stages_print(tmp_path: Path) -> None:
    script = "chain one stage talk $out/none bash -c 'echo said; echo wrong >&2'\nfinish_chains; echo after"
    status, output, errors = run(tmp_path, script)
    assert (status, errors) == (0, "")
    assert output.splitlines()[0] == "== talk"
    assert output.splitlines()[1] in ("== talk: 0 s", "== talk: 1 s")
    assert output.splitlines()[2] == "after"
    assert (tmp_path / "logs" / "talk.log").read_text() == "said\nwrong\n"


def test_chains_run_side_by_side(tmp_path: Path) -> None:
    # Each waits for a file that only the other one makes.
    meet = "stage $1 $out/none bash -c 'touch $0/$1; until [ -e $0/$2 ]; do sleep 0.05; done' $out $1 $2"
    script = f"meet() {{ {meet}; }}\nchain a meet a b\nchain b meet b a\nfinish_chains"
    assert run(tmp_path, script, JOBS="2")[0] == 0


def test_one_job_runs_chains_one_after_another_in_their_order(tmp_path: Path) -> None:
    script = "for name in c a b; do chain $name stage $name $out/none sleep 0.2; done; finish_chains"
    status, output, _ = run(tmp_path, script, JOBS="1")
    assert status == 0
    assert [line.split(":")[0] for line in output.splitlines()] == ["== c"] * 2 + ["== a"] * 2 + ["== b"] * 2


def test_chains_share_the_threads_of_the_machine(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    script = "chain a stage threads $out/none bash -c 'echo $OMP_NUM_THREADS'; finish_chains"
    for jobs in (1, 2, 64):
        assert run(tmp_path, script, JOBS=str(jobs))[0] == 0
        assert int((tmp_path / "logs" / "threads.log").read_text()) == max(1, cores // jobs)


def test_a_chain_within_a_chain_is_part_of_it(tmp_path: Path) -> None:
    inner = "chain inner stage s $out/none bash -c 'echo $CHAIN'; finish_chains"
    status, output, _ = run(tmp_path, f"nested() {{ {inner}; echo end; }}\nchain outer nested; finish_chains", JOBS="1")
    assert status == 0
    assert output.splitlines()[-1] == "end"
    assert (tmp_path / "logs" / "s.log").read_text() == "outer\n"


def test_listing_names_what_is_still_to_do_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "made").touch()
    lines = ["two() { stage x $out/made false; stage y $out/none false; }"]
    lines += ["stage first $out/none false", "chain a two", "chain b stage z $out/none false", "finish_chains"]
    status, output, errors = run(tmp_path, "\n".join(lines), LIST_STAGES="1")
    assert (status, output, errors) == (0, "- first\na y\nb z\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_bytecode_is_kept_with_the_results_where_python_keeps_none(tmp_path: Path) -> None:
    script = "stage import $out/none python3 -c 'import colorsys'"
    assert run(tmp_path, script, PYTHONDONTWRITEBYTECODE="1")[0] == 0
    assert "colorsys" in {path.name.split(".")[0] for path in tmp_path.glob("bytecode/**/*.pyc")}


def test_a_stage_that_fails_ends_the_other_chains_and_shows_its_log(tmp_path: Path) -> None:
    fails = "bash -c 'until [ -s $0/pid ]; do sleep 0.05; done; seq 30; echo broken; exit 7' $out"
    sleeps = "bash -c 'echo $$ >$0/pid; exec sleep 60' $out"
    lines = ["bad() { stage bad $out/none " + fails + "; stage next $out/none true; }"]
    lines += ["chain long stage long $out/none " + sleeps, "chain bad bad", "finish_chains", "echo after"]
    status, output, errors = run(tmp_path, "\n".join(lines), JOBS="2")
    assert status == 7
    assert sorted(output.splitlines()) == ["== bad", "== long"]
    shown = errors.splitlines()
    assert shown[0] == f"== bad: failed with status 7; the end of {tmp_path}/logs/bad.log:"
    assert shown[1:] == [*map(str, range(12, 31)), "broken"]
    assert not (tmp_path / "bad.seconds").exists()
    assert not is_running(int((tmp_path / "pid").read_text()))


# Ctrl-C reaches the whole process group of the terminal, which the chains have left; kill reaches the script alone.
@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_an_interrupt_ends_what_runs(tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals) -> None:
    sleeps = "bash -c 'echo $$ >$0/pid.$1; sleep 60; true' $out"
    lines = [f"chain {name} stage {name} $out/none {sleeps} {name}" for name in ("a", "b")]
    process = start(tmp_path, "\n".join([*lines, "finish_chains", "echo after"]), JOBS="2")
    files = [tmp_path / "pid.a", tmp_path / "pid.b"]
    wait_for(lambda: all(file.exists() and file.read_text().strip() for file in files))
    send(process.pid, number)
    output, errors = process.communicate(timeout=30)  # returns when nothing holds the pipes: the sleeps have ended too
    assert process.returncode == 128 + number
    assert sorted(output.splitlines()) == ["== a", "== b"]
    assert errors == ""
    assert not any(is_running(int(file.read_text())) for file in files)
