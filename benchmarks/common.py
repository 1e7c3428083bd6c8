"""What the benchmarks share: a made-up text and model, timing in turn, and the JSON record."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

SMALL_MODEL = (
    "--arch transformer_lm_wiki103 --decoder-layers 2 --decoder-embed-dim 128 --decoder-input-dim 128 "
    "--decoder-output-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 "
    "--adaptive-input-cutoff 2000,8000 --adaptive-softmax-cutoff 2000,8000 --dropout 0.1 --attention-dropout 0.0 "
    "--activation-dropout 0.0 --adaptive-softmax-dropout 0.0 --optimizer adam --adam-betas (0.9,0.98) --lr 0.003 "
    "--lr-scheduler inverse_sqrt --warmup-updates 50 --clip-norm 0.1 --criterion adaptive_loss "
    "--tokens-per-sample 256 --max-tokens 2048"
)


INPUTS = {
    "data": "data folder (default: made-up text)",
    "checkpoint": "checkpoint (default: trained for three updates)",
    "store": "datastore (default: saved of the training text)",
    "index": "index over the store (default: built)",
    "keys": "file of numpy's with keys to repeat, with noise (default: made-up ones)",
}


def parser(description: str, *inputs: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has, and those that name some of INPUTS."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", help="JSON file for the record (default: benchmarks/results/NAME.json)")
    made.add_argument("--repeats", type=int, default=5)
    for name in inputs:
        made.add_argument(f"--{name}", help=INPUTS[name])
    return made


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts in its own process."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done


def make_text(folder: Path, num_tokens: int, num_types: int = 16000, seed: int = 0) -> None:
    """Write train.txt and valid.txt of words whose frequencies fall as in natural text, lines of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    for name, size in (("train", num_tokens), ("valid", max(num_tokens // 20, 20000))):
        words = np.minimum(rng.zipf(1.2, size), num_types)
        words[:num_types] = np.arange(1, num_types + 1)  # every type, so that the dictionary is as large for any text
        with open(folder / f"{name}.txt", "w", encoding="utf-8") as file:
            start = 0
            while start < size:
                end = start + int(rng.integers(5, 60))
                file.write(" ".join(f"w{i}" for i in words[start:end]) + "\n")
                start = end


def make_data(folder: Path, num_tokens: int) -> Path:
    """A data folder made of :func:`make_text`."""
    make_text(folder, num_tokens)
    data = folder / "data-bin"
    prefixes = ("--trainpref", str(folder / "train.txt"), "--validpref", str(folder / "valid.txt"))
    run("preprocess.py", "--only-source", *prefixes, "--destdir", str(data))
    return data


def train(data: Path, folder: Path, updates: int = 3) -> Path:
    """A checkpoint of the small model after a few updates."""
    words = f"--save-dir {folder} --cpu --max-update {updates} --disable-validation {SMALL_MODEL}".split()
    run("train.py", str(data), *words)
    return folder / "checkpoint_last.pt"


def model_inputs(options: argparse.Namespace, folder: Path, num_tokens: int) -> tuple[Path, Path]:
    """Data and checkpoint: the named ones, or made-up ones."""
    data = Path(options.data) if options.data else make_data(folder, num_tokens)
    return data, Path(options.checkpoint) if options.checkpoint else train(data, folder / "ckpt")


def store_inputs(options: argparse.Namespace, folder: Path, metric: str) -> tuple[str, str, str, str]:
    """Data, checkpoint, store and index: the named ones, or made-up ones of the reference store's size."""
    data, checkpoint = map(str, model_inputs(options, folder, 420_000))
    store, index = options.store or str(folder / "dstore"), options.index or str(folder / "knn.index")
    if not options.store:
        words = "--cpu --gen-subset train --max-tokens 4096 --context-window 192 --tokens-per-sample 64"
        words += f" --knn-keytype last_ffn_input --save-knnlm-dstore --dstore-mmap {store}"
        run("eval_lm.py", data, "--path", checkpoint, *words.split())
    if not options.index:
        words = f"--dist {metric} --ncentroids 64 --code_size 16 --num_keys_to_add_at_a_time 100000"
        run("build_dstore.py", "--dstore_mmap", store, "--faiss_index", index, *words.split())
    return data, checkpoint, store, index


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both calls, A B A B ..., after one uncounted turn, so that a drifting machine slows both."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[..., Any]], *given: Any) -> Iterator[Callable[..., Any]]:
    """``make(*given)`` called in a new process, as a call that runs there; what it takes and returns is pickled.

    A peer runs in one as its users run it: our commands set the allocator of their process.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_serve, args=(there, make, given), daemon=True)
    process.start()
    there.close()

    def call(*parts: Any) -> Any:
        here.send(parts)
        return here.recv()  # EOFError where the process has failed and printed why

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(connection: Any, make: Callable[..., Callable[..., Any]], given: Sequence[Any]) -> None:
    function = make(*given)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(function(*connection.recv()))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(above, below))


def plain_and_knn(words: Sequence[str], repeats: int) -> tuple[list[float], list[float], int, Any]:
    """Seconds of plain evaluation and of evaluation with the memory that eval_lm.py's words name, in turn.

    Returns: both, the number of scored tokens, and the memory's reader.
    """
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.memories import open_reader
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import evaluation_configs, parse_eval_lm
    from fairseq.sequence_scorer import SequenceScorer

    configs = evaluation_configs(parse_eval_lm(words))
    opened = open_evaluation(configs, in_order=False)
    _, reader = open_reader(configs, opened)
    plain_scorer = SequenceScorer(opened.models, softmax_batch=1024)
    key_scorer = SequenceScorer(opened.models, key_tap="last_ffn_input", softmax_batch=1024)
    report = PerplexityReport(opened.task.dictionary)
    plain, with_memory = in_turn(
        lambda: evaluate(plain_scorer, opened.iterator(), report),
        lambda: evaluate(key_scorer, opened.iterator(), report, reader),
        repeats,
    )
    return plain, with_memory, opened.num_scored_tokens, reader


def tell(name: str, what: str, ratio: float, wanted: str, details: dict[str, Any], out: str | None) -> None:
    """Print the ratio and write the record."""
    from fairseq.runtime.manifest import write_manifest

    sys.stdout.write(f"{name}: {what}: {ratio:.3f} (wanted: {wanted})\n")
    path = out or str(ROOT / "benchmarks" / "results" / f"{name}.json")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figures = {"claim": what, "ratio": ratio, "wanted": wanted} | json.loads(json.dumps(details, default=float))
    write_manifest(path, program=f"benchmarks/{name}.py", argv=sys.argv[1:], config={}, figures=figures)
