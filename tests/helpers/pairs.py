"""Pairs of commands that write the same output at the same time.

A program of its own: it imports everything once and forks, so that a pair costs no start of Python and both begin
within a millisecond. ``python pairs.py FOLDER DATA_BIN CHECKPOINT COUNT`` prints a JSON object for each pair: what went
wrong (an empty list where all is right) and whether one of the two was rejected.

A pair is right if both succeed and leave what one after the other leaves, in either order, or if one is rejected with
exit status 2 and a line that names the other process, and what the other leaves is what it leaves alone. A line that
the second gets in a run after the first is right too, if the files are those of that run.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  and what the first step of an optimizer imports, before forking
import numpy as np
import torch
import torch._dynamo
from conftest import TINY_MODEL
from forked_commands import end_after

import fairseq_cli.average_checkpoints
import fairseq_cli.build_dstore
import fairseq_cli.data.bm25_make_batches
import fairseq_cli.data.bm25_search
import fairseq_cli.datastore
import fairseq_cli.eval_lm
import fairseq_cli.preprocess
import fairseq_cli.train
from fairseq.checkpoint_utils import load_checkpoint
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.storage import save_memory
from fairseq_cli.entry import run

SECONDS = 60.0
"""A command that takes longer is taken for stuck."""

MAINS: dict[str, Callable[[Sequence[str]], None]] = {
    name: getattr(room, name).main
    for room, names in (
        (fairseq_cli, ("average_checkpoints", "build_dstore", "datastore", "eval_lm", "preprocess", "train")),
        (fairseq_cli.data, ("bm25_make_batches", "bm25_search")),
    )
    for name in names
}


@dataclass(frozen=True)
class Job:
    """Two commands for one output, run in a folder that ``files`` are copied into."""

    one: str
    two: str
    files: tuple[str, ...] = ()


def _twice(line: str, *files: str) -> Job:
    return Job(line, line, files)


EVAL = "eval_lm {data} --path {model} --cpu --max-sentences 2 --context-window 24 --tokens-per-sample 8"
SAVE = f"{EVAL} --gen-subset valid --save-knnlm-dstore --dstore-mmap new"
SEARCH = "bm25_search --index_path index --segments_path segments.json --results_path results --num_neighbors 3"
KNN = f"{EVAL} --gen-subset test --knnlm --dstore-filename store --k 4"
TRAIN = f"train {{data}} --save-dir run --max-update 4 --save-interval-updates 2 {' '.join(TINY_MODEL)}"
INDEX = "build_dstore --dstore_mmap store --faiss_index new --ncentroids 4 --code_size 4 --no-report"
PART = INDEX.replace(" store", " large") + " --index ivfpq --num_shards 2"

JOBS = {
    "preprocess": _twice("preprocess --only-source --trainpref train.txt --destdir out", "train.txt"),
    "preprocess in two ways": Job(
        "preprocess --only-source --trainpref train.txt --destdir out",
        "preprocess --only-source --trainpref train.txt --nwordssrc 24 --destdir out",
        ("train.txt",),
    ),
    "train": _twice(TRAIN),
    "save a store": _twice(SAVE),
    "save two stores": Job(SAVE, f"{SAVE} --dstore-fp16"),
    "save a shard": Job(f"{SAVE} --num-shards 2 --shard-id 0", f"{SAVE} --num-shards 2 --shard-id 1"),
    "save a retrieval": _twice(f"{KNN} --save-retrieval new", "store"),
    "save two retrievals": Job(f"{KNN} --save-retrieval new", f"{KNN} --save-retrieval new --lmbda 0.5", ("store",)),
    "build ivfpq": _twice(f"{INDEX} --index ivfpq", "store"),
    "build two kinds": Job(f"{INDEX} --index ivfpq", f"{INDEX} --index flat", ("store",)),
    "build two parts": Job(f"{PART} --shard_id 0", f"{PART} --shard_id 1", ("large",)),
    "build a graph": _twice(f"{INDEX} --index HNSW8", "store"),
    "cluster": _twice("build_dstore --dstore_mmap store --cluster_dstore --num_clusters 9", "store"),
    "delete": _twice("datastore delete store --rows 3,10-20", "store"),
    "delete two": Job("datastore delete store --rows 3", "datastore delete store --rows 10-20", ("store",)),
    "delete and compact": _twice("datastore delete store --rows 3,10-20 --compact", "store"),
    "compact beside a deletion": Job(
        "datastore delete store --compact", "datastore delete store --rows 7 --generation 0", ("store",)
    ),
    "compact": _twice("datastore delete store --compact", "store"),
    "convert": _twice("datastore convert store new --dtype float16", "store"),
    "convert and sample": Job("datastore convert store new", "datastore sample store new --rows 50", ("store",)),
    "merge": _twice("datastore merge new store store", "store"),
    "merge over a conversion": Job("datastore merge new store store", "datastore convert store new", ("store",)),
    "bm25 search": _twice(SEARCH, "segments.json"),
    "bm25 search in parts": Job(
        f"{SEARCH} --num_shards 2 --shard_id 0", f"{SEARCH} --num_shards 2 --shard_id 1", ("segments.json",)
    ),
    "bm25 batches": _twice(
        "bm25_make_batches --results_path results --batch_file batches.json", "segments.json", "results"
    ),
    "average": _twice("average_checkpoints --inputs {model} {model} --output new.pt"),
    "save a memory": Job("memory 1", "memory 1"),
    "save two memories": Job("memory 1", "memory 2"),
    "save a store of a Hugging Face model": _twice("saver"),
}


def _memory(words: Sequence[str]) -> None:
    """Save a memory of random keys."""
    key_GSD = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(int(words[0])))
    made = Memory({0: LayerMemory(key_GSD, key_GSD + 1)}, torch.arange(500), torch.arange(500), (0,), None, "origin", 0)
    save_memory(made, "new.safetensors")


def _saver(words: Sequence[str]) -> None:
    """Save the store of a model of Hugging Face's."""
    from fairseq.hf import KNNSaver

    model = _model()
    with torch.no_grad(), KNNSaver(dstore_dir="stores", name="new")(model) as saver:
        for number in range(6):
            ids_BT = (torch.arange(64).view(2, 32) * (number + 3)) % 40
            model(input_ids=ids_BT, labels=ids_BT)
        assert saver.prefix is not None


@functools.cache
def _model() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


MAINS |= {"memory": _memory, "saver": _saver}


class Runner:
    """Runs commands in forks of this process."""

    def __init__(self, folder: Path, data: Path, model: Path) -> None:
        self._folder, self._values = folder, {"data": str(data), "model": str(model)}
        self._alone: dict[tuple[str, ...], tuple[Outcome, ...]] = {}
        self._seconds: dict[str, float] = {}
        self._make_inputs(data)

    def _make_inputs(self, data: Path) -> None:
        inputs = self._folder / "inputs"
        inputs.mkdir(parents=True)
        shutil.copy(data.parent / "train.txt", inputs)
        lines = (data.parent / "valid.txt").read_text().splitlines()
        texts = [{"id": str(number), "contents": line} for number, line in enumerate(lines)]
        (inputs / "segments.json").write_text(json.dumps(texts))
        runs = np.array([[200 * number, number, 0] for number in range(3)])
        for name, rows in (("store", 600), ("large", 40_000)):
            keys = np.random.default_rng(0).standard_normal((rows, 16), dtype=np.float32)
            with DatastoreWriter(inputs / name, rows, 16, metadata={"num_documents": 3}, documents=runs) as writer:
                writer.append(keys, np.arange(rows) % 60)
                writer.finish()
        made = self._folder / "made"
        made.mkdir()
        shutil.copy(inputs / "segments.json", made)
        assert self.together(made, [SEARCH], [0.0])[0].code == 0
        shutil.copytree(made / "results", inputs / "results")

    def pair(self, name: str, number: int, draw: random.Random) -> dict[str, Any]:
        """Run a pair; returns what is wrong, and how both ended."""
        job = JOBS[name]
        longest = max(self._seconds_of(job.one, job), self._seconds_of(job.two, job))
        # Half of the pairs begin at the same moment, the others at different ones of the same work.
        delays = [0.0, 0.0 if draw.random() < 0.5 else draw.random() * longest]
        draw.shuffle(delays)
        folder = self._prepared(job)
        ended = self.together(folder, [job.one, job.two], delays)
        left = content(folder)
        shutil.move(folder, self._folder / "left")
        faults = self._faults(job, ended, left)
        if faults:
            shutil.copytree(self._folder / "left", self._folder / f"fault{number}")
        shutil.rmtree(self._folder / "left")
        codes = [outcome.code for outcome in ended]
        return {"pair": name, "codes": codes, "faults": faults, "errors": [o.error for o in ended] if faults else []}

    def _faults(self, job: Job, ended: Sequence[Outcome], left: dict[str, str]) -> list[str]:
        for outcome in ended:
            if outcome.code not in (0, 2) or "Traceback" in outcome.error:
                return [f"exit {outcome.code}: {outcome.error[-1500:]}"]
        if ended[0].code == ended[1].code == 2:
            return ["both were rejected"]
        lines, faults = (job.one, job.two), []
        for first, second in ((0, 1), (1, 0)):
            if ended[first].code:
                continue
            after = self._one_after_the_other(job, lines[first], lines[second])
            if ended[second].code == 2 and self._names(ended[second], ended[first]):
                alone = self._one_after_the_other(job, lines[first])
                faults.append(difference(left, alone[-1].left))
            elif ended[second].code == 2 and error_of(after[-1]) != error_of(ended[second]):
                faults.append(f"rejected without naming the process: {ended[second].error[-600:]}")
            else:
                faults.append(difference(left, after[-1].left))
        return [] if "" in faults else faults

    def _names(self, rejected: Outcome, other: Outcome) -> bool:
        return f"process {other.pid} on {socket.gethostname()}" in rejected.error

    def _one_after_the_other(self, job: Job, *lines: str) -> tuple[Outcome, ...]:
        key = (*job.files, *lines)
        if key not in self._alone:
            folder = self._prepared(job)
            ended = []
            for line in lines:
                (outcome,) = self.together(folder, [line], [0.0])
                ended.append(Outcome(outcome.code, outcome.error, outcome.pid, outcome.seconds, content(folder)))
            self._alone[key] = tuple(ended)
        return self._alone[key]

    def _seconds_of(self, line: str, job: Job) -> float:
        return self._one_after_the_other(job, line)[0].seconds

    def _prepared(self, job: Job) -> Path:
        """The folder of a pair, afresh; it is the same for all, since some files hold names."""
        folder = self._folder / "run" / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in (self._folder / "inputs").iterdir():
            if any(path.name == file or path.name.startswith((f"{file}_", f"{file}.")) for file in job.files):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
        return folder

    def together(self, folder: Path, lines: Sequence[str], delays: Sequence[float]) -> list[Outcome]:
        """Run commands at the same time; each begins so many seconds after the others are ready."""
        logs = [folder.parent / f"log{number}" for number in range(len(lines))]
        gate_out, gate_in = os.pipe()
        pids = []
        for line, delay, log in zip(lines, delays, logs):
            pid = os.fork()
            if not pid:
                os.close(gate_in)
                os.read(gate_out, 1)  # until all are there
                time.sleep(delay)
                self._become(line, folder, log)
            pids.append(pid)
        os.close(gate_out)
        os.close(gate_in)
        started, codes, ends = time.time(), dict.fromkeys(pids, None), dict.fromkeys(pids, 0.0)
        while None in codes.values():
            for pid in pids:
                if codes[pid] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid], ends[pid] = os.waitstatus_to_exitcode(status), time.time() - started
                    elif time.time() - started > SECONDS:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [
            Outcome(codes[pid], log.read_text(errors="replace"), pid, ends[pid], {}) for pid, log in zip(pids, logs)
        ]

    def _become(self, line: str, folder: Path, log: Path) -> None:
        """Run a command in this process, and end it."""

        def work() -> None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(folder)
            program, *words = line.format(**self._values).split()
            run(program, MAINS[program], words)

        end_after(work)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: Any
    error: str
    pid: int
    seconds: float
    left: dict[str, str]


def error_of(outcome: Outcome) -> str:
    """Its line, without what differs from run to run."""
    lines = [line for line in outcome.error.splitlines() if ": error: " in line]
    return re.sub(r"\d+", "0", lines[-1]) if outcome.code and lines else ""


def content(folder: Path) -> dict[str, str]:
    """Name -> digest of each file below a folder, times and random names excepted."""
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(path: Path) -> str:
    if path.name.endswith(".run.json"):
        return "a manifest"
    if path.suffix == ".json":
        return hashlib.sha256(
            json.dumps(_without_times(json.loads(path.read_bytes())), sort_keys=True).encode()
        ).hexdigest()
    if path.suffix == ".pt":
        model = load_checkpoint(str(path)).model
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.values())).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


_TIMES = ("seconds", "json_checksum")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not any(word in k for word in _TIMES)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def difference(left: dict[str, str], expected: dict[str, str]) -> str:
    """The files that differ, in words; empty where none does."""
    names = sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))
    words = [
        f"{name} {'is too much' if name not in expected else 'is missing' if name not in left else 'differs'}"
        for name in names
    ]
    return "; ".join(words)


def main() -> None:
    """Run pairs of all jobs in turn, in an order and with delays that are the same every time."""
    folder, data, model, count = sys.argv[1:]
    torch.set_num_threads(1)
    _model()
    draw = random.Random(int(os.environ.get("FAIRSEQ_PAIRS_SEED", "1")))
    runner = Runner(Path(folder), Path(data), Path(model))
    only = os.environ.get("FAIRSEQ_PAIRS_ONLY")
    names = itertools.cycle([name for name in JOBS if not only or re.search(only, name)])
    for number, name in enumerate(itertools.islice(names, int(count))):
        sys.stdout.write(json.dumps(runner.pair(name, number, draw)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
