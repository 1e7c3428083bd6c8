"""Evaluation with kNN-LM from a cold start, ``eval_lm.py --knnlm``, against a script that is written by hand.

Both sides are whole processes, from start to printed loss, with the same model, text, store and IVFPQ index (k 1024);
the script is ``plain_knnlm.py``, which searches by faiss. Compiled kernels are on disk from the first, uncounted turn
on, as they are after a user's first run or ``fairseq-datastore doctor --warm``. ``--tokens`` takes the first tokens of
the text alone: the shorter the text, the more of the time is start-up.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

sys.path.insert(0, str(common.ROOT))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # neither side compiles its modules in each process

BLOCK, CONTEXT, ROWS, PROBE, SHARE, K = 64, 192, 8, 8, 0.25, 1024
TEXT = f"--cpu --gen-subset valid --sample-break-mode none --tokens-per-sample {BLOCK} --context-window {CONTEXT}"
TEXT += f" --max-tokens {ROWS * (BLOCK + CONTEXT)}"
MEMORY = f"--knn-keytype last_ffn_input --knnlm --no-load-keys --k {K} --probe {PROBE} --lmbda {SHARE}"
APART = 1e-3
"""Nats that the losses may be apart by."""


def main() -> None:
    """Time whole processes in turn."""
    parser = common.parser(__doc__, *common.INPUTS)
    parser.add_argument("--tokens", type=int, default=0, help="first tokens of the text that are scored (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data, checkpoint, store, index = common.store_inputs(options, folder, "l2")
        data = beginning(Path(data), folder, options.tokens) if options.tokens else data
        index = index if Path(index).is_file() else f"{index}.l2"
        losses = [0.0, 0.0]
        plain_words = [data, "--path", checkpoint, *TEXT.split(), "--eval-file", str(folder / "own.json")]
        words = [*plain_words, *MEMORY.split(), "--dstore-filename", store, "--indexfile", index]
        settings = {"k": K, "probe": PROBE, "lmbda": SHARE, "block": BLOCK, "context": CONTEXT, "rows": ROWS}
        script = ["benchmarks/plain_knnlm.py", data, checkpoint, store, index, json.dumps(settings)]
        peer: dict[str, Any] = {}

        def own() -> None:
            common.run("eval_lm.py", *words)
            losses[0] = json.loads((folder / "own.json").read_text())["loss_base2"] * math.log(2)

        def theirs() -> None:
            peer.update(json.loads(common.run(*script).stdout))
            losses[1] = peer["loss"]

        seconds, other = common.in_turn(own, theirs, options.repeats)
        plain = [common.seconds(lambda: common.run("eval_lm.py", *plain_words)) for _ in range(options.repeats)]
        apart = abs(losses[0] - losses[1])
        if not apart <= APART:
            raise ValueError(f"losses {losses} are {apart:.1e} nats apart; {APART} is the most")
        with common.in_own_process(phases, words) as ended:
            own_ended = ended()
    details = {"own_seconds": seconds, "peer_seconds": other, "plain_seconds": plain, "tokens": peer["tokens"]}
    details |= {"losses": losses, "own_phases": lengths(own_ended), "peer_phases": lengths(peer["ended"])}
    name = f"cold_start_{options.tokens}" if options.tokens else "cold_start"
    what = "a hand-written script's seconds over eval_lm.py --knnlm's, whole commands"
    common.tell(name, what, common.median_ratio(other, seconds), ">= 1", details, options.out)
    sys.stdout.write(f"  {peer['tokens']} tokens; losses apart by {apart:.1e} nats\n")
    for side, of_side in (("ours", details["own_phases"]), ("peer", details["peer_phases"])):
        sys.stdout.write(f"  {side}: {', '.join(f'{name} {part:.2f}' for name, part in of_side.items())} s\n")


def beginning(data: Path, folder: Path, num_tokens: int) -> str:
    """A data folder with the first tokens of another one's valid."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

    made = folder / "beginning"
    made.mkdir()
    shutil.copy(data / "dict.txt", made)
    text = MMapIndexedDataset(str(data / "valid"))
    builder = MMapIndexedDatasetBuilder(str(made / "valid.bin"), dtype=text.tokens.dtype)
    builder.add_item(text.tokens[:num_tokens])
    builder.finalize(str(made / "valid.idx"))
    return str(made)


def lengths(ended: dict[str, float]) -> dict[str, float]:
    """The seconds of each phase, of the seconds until each has ended."""
    return {name: end - start for (name, end), start in zip(ended.items(), [0.0, *ended.values()])}


def phases(words: Sequence[str]) -> Callable[[], dict[str, float]]:
    """A call of a new process that evaluates as eval_lm.py does, and returns the seconds until each phase ended."""
    began = time.perf_counter()
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.memories import open_reader
    from fairseq.evaluation.outputs import write_outputs
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import evaluation_configs, parse_eval_lm

    def run() -> dict[str, float]:
        ended = {"import": time.perf_counter() - began}
        configs = evaluation_configs(parse_eval_lm(words))
        opened = open_evaluation(configs, in_order=False)
        ended["model and text"] = time.perf_counter() - began
        scorer, reader = open_reader(configs, opened)
        ended["store and index"] = time.perf_counter() - began

        def watched() -> Iterator[Any]:
            for number, batch in enumerate(opened.iterator()):
                if number == 1:
                    ended["first batch"] = time.perf_counter() - began
                yield batch
            ended["other batches"] = time.perf_counter() - began

        report = PerplexityReport(opened.task.dictionary)
        seconds = evaluate(scorer, watched(), report, reader)
        ended["search and mixture"] = time.perf_counter() - began
        write_outputs(configs, opened, report, report.figures(opened.num_total_tokens, seconds))
        ended["files"] = time.perf_counter() - began
        return ended

    return run


if __name__ == "__main__":
    main()
