"""kill -9 at random moments: the same command goes on, and ends with the same bytes as a run left alone.

``FAIRSEQ_KILLS=10`` kills ten times per program instead of once.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL, Command
from forked_commands import Forks

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter

KILLS = int(os.environ.get("FAIRSEQ_KILLS", "1"))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Killer:
    """Kills scripts at random moments."""

    forks: Forks

    def run(self, script: str, words: list[object], started: Callable[[], bool], seconds: float, seed: int) -> None:
        """Kill a script KILLS times at a random moment after ``started`` says it is at work; then let it end."""
        killed = self.kill(script, words, started, seconds, seed, KILLS)
        assert killed, "every run had ended before it could be killed: the test tests nothing"
        # In this interpreter: the order of sets, for one, is another than in the killed process. One thread, as there.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        importlib.import_module(f"fairseq_cli.{Path(script).stem}").main([*map(str, words)])
        torch.set_num_threads(threads)

    def kill(
        self, script: str, words: list[object], started: Callable[[], bool], seconds: float, seed: int, kills: int
    ) -> int:
        """Start a script ``kills`` times and kill it if it has not ended by itself. Returns: the kills."""
        draw = random.Random(seed)
        killed = 0
        for _ in range(kills):
            process = self.forks.start(script, *words)
            deadline = time.time() + 120
            while not started() and process.poll() is None and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(draw.random() * seconds)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
            code = process.wait()
            assert code in (0, -signal.SIGKILL), f"exit {code}\n{process.err[-2000:]}"
        return killed


@pytest.fixture
def killer(forks: Forks) -> Killer:
    """Kills scripts that this machine runs."""
    return Killer(forks)


class Saving(NamedTuple):
    """Words that save a store, and the prefix of what they save."""

    words: list[object]
    whole: Path


@pytest.fixture(scope="module")
def saving(trained: Path, data_bin: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Saving:
    """A store saved by a run left alone."""
    words: list[object] = [data_bin, "--path", trained / "checkpoint_best.pt", "--cpu", "--gen-subset", "train"]
    words += ["--context-window", 24, "--tokens-per-sample", 8, "--max-sentences", 1, "--save-knnlm-dstore"]
    saving = Saving([*words, "--dstore-mmap"], tmp_path_factory.mktemp("saved") / "whole")
    command("eval_lm.py", *saving.words, saving.whole)
    return saving


def test_training_goes_on_bit_for_bit(data_bin: Path, command: Command, killer: Killer, tmp_path: Path) -> None:
    words = [data_bin, "--max-epoch", 4, "--save-interval-updates", 7, "--keep-interval-updates", 1, *TINY_MODEL]
    command("train.py", *words, "--save-dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    killer.run("train.py", [*words, "--save-dir", killed], lambda: any(killed.glob("*.pt")), 1.0, seed=1)
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "whole", killed))
        assert one["progress"]["keeper"] == two["progress"]["keeper"]
        assert one["progress"]["num_updates"] == two["progress"]["num_updates"]
        for weight in one["model"]:
            assert torch.equal(one["model"][weight], two["model"][weight]), weight


def test_saving_goes_on_with_the_same_bytes(saving: Saving, killer: Killer, tmp_path: Path) -> None:
    at_work = lambda: any(tmp_path.glob("killed*tmp*"))  # noqa: E731
    killer.run("eval_lm.py", [*saving.words, tmp_path / "killed"], at_work, 0.2, seed=2)
    for end in ("_keys.npy", "_vals.npy"):
        assert Path(f"{saving.whole}{end}").read_bytes() == (tmp_path / f"killed{end}").read_bytes()
    assert json.loads((tmp_path / "killed.json").read_text())["complete"]


def test_saving_in_shards_goes_on_with_the_same_bytes(
    saving: Saving, killer: Killer, command: Command, tmp_path: Path
) -> None:
    for shard in (1, 0):
        at_work = lambda: any(tmp_path.glob(f"killed.part{shard}*tmp*"))  # noqa: B023, E731
        words = [*saving.words, tmp_path / "killed", "--num-shards", 2, "--shard-id", shard]
        assert killer.kill("eval_lm.py", words, at_work, 0.1, seed=4 + shard, kills=KILLS)
        command("eval_lm.py", *words)
    for end in ("_keys.npy", "_vals.npy"):
        parts = [(tmp_path / f"killed.part{shard}-of-2{end}").read_bytes() for shard in range(2)]
        assert b"".join(parts) == Path(f"{saving.whole}{end}").read_bytes()
    store = Datastore.open(tmp_path / "killed")
    store.verify()
    assert len(store) == len(Datastore.open(saving.whole))


def test_torchrun_saves_a_shard_per_process(trained: Path, data_bin: Path, tmp_path: Path) -> None:
    words = [data_bin, "--path", trained / "checkpoint_best.pt", "--cpu", "--gen-subset", "valid", "--max-sentences", 2]
    words += ["--context-window", 24, "--tokens-per-sample", 8, "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "d"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += [str(ROOT / "eval_lm.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{tmp_path / 'd'}: " in done.stdout
    store = Datastore.open(tmp_path / "d")
    assert [Path(part.prefix).name for part in store.shards] == ["d.part0-of-2", "d.part1-of-2"]
    store.verify()


@pytest.mark.parametrize(("kind", "shards"), [("ivfpq", 2), ("HNSW8", 1)])
def test_indexing_goes_on_with_the_same_bytes(
    command: Command, killer: Killer, tmp_path: Path, kind: str, shards: int
) -> None:
    """The report is made at the end: a kill during it loses nothing either."""
    rows, dim = (120_000, 16) if shards > 1 else (50_000, 16)
    keys = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    with DatastoreWriter(tmp_path / "dstore", rows, dim, "float32", {}) as writer:
        writer.append(keys, np.arange(rows))
        writer.finish()
    base = ["--dstore_mmap", tmp_path / "dstore", "--index", kind, "--ncentroids", 64, "--code_size", 8]
    base += ["--num_keys_to_add_at_a_time", 16384, "--report_k", 64, "--faiss_index"]
    began = time.time()
    command("build_dstore.py", *base, tmp_path / "whole", "--no-report")
    seconds = 0.8 * (time.time() - began)  # the rest is spent on starting
    killed = point = 0
    while point < KILLS or (not killed and point < KILLS + 5):
        point += 1
        folder = tmp_path / str(point)
        folder.mkdir()
        for shard in reversed(range(shards)):
            parts = ["--num_shards", shards, "--shard_id", shard] if shards > 1 else []
            at_work = lambda: any(folder.glob("killed*.lock"))  # noqa: B023, E731
            words = [*base, folder / "killed", *parts]
            killed += killer.kill("build_dstore.py", words, at_work, seconds, seed=10 * point + shard, kills=1)
            command("build_dstore.py", *words)
            for path in folder.glob("*.lock"):  # which a kill leaves, and the next process would seem to have begun
                path.unlink()
        assert (tmp_path / "whole.l2").read_bytes() == (folder / "killed.l2").read_bytes()
        assert {path.name for path in folder.iterdir()} == {f"killed.l2{end}" for end in ("", ".json", ".run.json")}
    print(f"{killed} of {point * shards} runs were killed at work")
    assert killed, "every run had ended before it could be killed: the test tests nothing"
