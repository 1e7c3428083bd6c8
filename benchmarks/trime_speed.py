"""TRIME's evaluation over plain evaluation, tokens/s: local 0.8, long 0.85, external with interpolation 0.5."""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

EVALUATION = (
    "--cpu --sample-break-mode complete --max-tokens 256 --context-window 192 --softmax-batch 1024 --max-sentences 1 "
    "--knn-keytype last_ffn_input"
)
LOCAL = "--use-local"
LONG = f"{LOCAL} --use-long --mem-size 1024"
WANTED = {"local": 0.8, "long": 0.85, "external": 0.5}


def evaluation(data: str, checkpoint: str, more: str) -> Any:
    """A call that evaluates once, everything opened beforehand."""
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.memories import open_reader
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import evaluation_configs, parse_eval_lm
    from fairseq_cli.entry import keep_freed_memory

    keep_freed_memory()
    words = [data, "--path", checkpoint, "--gen-subset", "valid", *EVALUATION.split(), *more.split()]
    configs = evaluation_configs(parse_eval_lm(words, "eval_lm-trime.py"))
    opened = open_evaluation(configs, in_order=True)
    scorer, reader = open_reader(configs, opened)
    report = PerplexityReport(opened.task.dictionary)
    return functools.partial(_evaluate, evaluate, scorer, opened, report, reader)


def _evaluate(evaluate: Any, scorer: Any, opened: Any, report: Any, reader: Any) -> None:
    if scorer.text_memory is not None:
        for source in scorer.text_memory.sources:
            source.reset()
    evaluate(scorer, opened.iterator(), report, reader)


def main() -> None:
    """Evaluate with each set of memories, in turn."""
    options = common.parser(__doc__, *common.INPUTS).parse_args()
    with tempfile.TemporaryDirectory() as made:
        data, checkpoint, store, index = common.store_inputs(options, Path(made), "ip")
        external = f"{LONG} --use-external --dstore-filename {store} --indexfile {index} --faiss-metric-type ip "
        external += "--no-load-keys --k 64 --probe 8 --use-interp --interp-temp 4 --lmbda 0.2"
        calls = {"plain": "", "local": LOCAL, "long": LONG, "external": external}
        runs = {name: evaluation(data, checkpoint, more) for name, more in calls.items()}
        for run in runs.values():
            run()
        seconds = [{name: common.seconds(run) for name, run in runs.items()} for _ in range(options.repeats)]
    ratios = {name: statistics.median(s["plain"] / s[name] for s in seconds) for name in WANTED}
    worst = min(ratios[name] / wanted for name, wanted in WANTED.items())
    details = {"ratios": ratios, "wanted_each": WANTED, "seconds": seconds}
    claim = "smallest share of what is wanted of plain evaluation's speed"
    common.tell("trime_speed", claim, worst, ">= 1", details, options.out)
    for name, ratio in ratios.items():
        sys.stdout.write(f"  {name}: {ratio:.2f} of plain evaluation (wanted: >= {WANTED[name]})\n")


if __name__ == "__main__":
    main()
