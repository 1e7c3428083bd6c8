"""A sweep over 100 settings from saved neighbours takes at most 1.1 times one evaluation with the datastore.

Both sides are whole commands in their own processes, start-up and loading included: eval_lm.py --knnlm at one setting,
and fairseq-knn-sweep over 100. With --separate the 100 settings are also evaluated one by one (in one process, from one
pass of the language model, each with its own search), and the largest difference of the loss is told.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))
# Of the commands that are started with -m, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])

WANTED = 1.1
EVALUATION = (
    "--cpu --sample-break-mode complete --max-tokens 256 --context-window 192 --softmax-batch 1024 --max-sentences 1 "
    "--gen-subset valid --knn-keytype last_ffn_input --knnlm --probe 8"
)
WEIGHTS = [round(0.1 * step, 1) for step in range(10)]
TEMPERATURES = [1.0, 3.0, 10.0, 30.0, 100.0]


def main() -> None:
    """Save once, then one evaluation and one sweep, in turn."""
    parser = common.parser(__doc__, *common.INPUTS)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--separate", action="store_true", help="also evaluate every setting by itself and compare")
    options = parser.parse_args()
    ks = [max(1, options.k // 8), options.k]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data, checkpoint, store, index = common.store_inputs(options, folder, "l2")
        words = [data, "--path", checkpoint, *EVALUATION.split(), "--dstore-filename", store, "--indexfile", index]
        words += ["--k", str(options.k), "--lmbda", "0.25", "--eval-file", str(folder / "one.json")]
        saved = str(folder / "valid.retrieval")
        common.run("eval_lm.py", *words, "--save-retrieval", saved)
        grid = ("--k", _list(ks), "--lmbda", _list(WEIGHTS), "--temperature", _list(TEMPERATURES))
        sweep = ("-m", "fairseq_cli.memory.knn_sweep", saved, *grid, "--out", str(folder / "sweep"))
        swept, one = common.in_turn(
            lambda: common.run(*sweep), lambda: common.run("eval_lm.py", *words), options.repeats
        )
        results = json.loads((folder / "sweep.json").read_text())["settings"]
        details: dict[str, Any] = {"sweep_seconds": swept, "evaluation_seconds": one, "settings": len(results)}
        details |= {"tokens": results[0]["num_tokens"], "k": ks, "bytes": os.path.getsize(saved)}
        if options.separate:
            details["largest_difference"] = difference(words, results)
    name = f"sweep of {len(results)} settings over one evaluation, seconds"
    common.tell("sweep", name, common.median_ratio(swept, one), f"<= {WANTED}", details, options.out)
    if options.separate:
        sys.stdout.write(f"  largest difference from separate evaluations: {details['largest_difference']:.2e} bits\n")


def difference(words: list[str], results: list[dict[str, Any]]) -> float:
    """Largest difference of the loss between the sweep and evaluations of each setting by itself."""
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.memories import open_reader
    from fairseq.evaluation.readers import CandidateReader
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.memory.combiners.interpolation import Interpolation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import evaluation_configs, parse_eval_lm

    configs = evaluation_configs(parse_eval_lm(words))
    opened = open_evaluation(configs, in_order=False)
    scorer, reader = open_reader(configs, opened)
    memory = reader.source  # type: ignore[union-attr]
    scored = [scorer.score(batch) for batch in opened.iterator()]
    loss = {(row["k"], row["softmax_temp"], row["lmbda"]): row["loss_base2"] for row in results}
    worst = 0.0
    for k, temperature, weight in itertools.dot({row["k"] for row in results}, TEMPERATURES, WEIGHTS):
        memory.k = k
        report = PerplexityReport(opened.task.dictionary)
        evaluate(_Scored(), scored, report, CandidateReader(Interpolation(weight, temperature), memory))  # type: ignore[arg-type]
        figures = report.figures(opened.num_total_tokens, 1.0)
        worst = max(worst, abs(figures.loss_base2 - loss[k, temperature, weight]))
    return worst


class _Scored:
    """Stands for the language model: its batches are scored already."""

    def score(self, batch: Any) -> Any:
        return batch


def _list(numbers: list[Any]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    main()
