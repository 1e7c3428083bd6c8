"""Plain evaluation and a training step each spend at most a tenth of their time outside model, softmax and optimizer.

The parts are timed where they are called: the model's forward pass and its softmax; in training also the backward
pass and the optimizer's step. The rest is batching, seeding, clipping, bookkeeping and logging.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))


class Stopwatch:
    """Adds up the seconds spent inside wrapped methods (the outermost counts, nested calls are not counted twice)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, owner: Any, name: str) -> None:
        """Time ``owner.name`` from now on."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began

        object.__setattr__(owner, name, timed)


def evaluation_share(data: Path, checkpoint: Path, more: list[str]) -> float:
    """Share of one evaluation outside model and softmax."""
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import evaluation_configs, parse_eval_lm
    from fairseq.sequence_scorer import SequenceScorer

    words = [str(data), "--path", str(checkpoint), "--cpu", "--gen-subset", "valid", *more]
    opened = open_evaluation(evaluation_configs(parse_eval_lm(words)), in_order=False)
    model = opened.models[0]
    scorer = SequenceScorer(opened.models, softmax_batch=1024)
    evaluate(scorer, opened.iterator(), PerplexityReport(opened.task.dictionary))
    watch = Stopwatch()
    watch.around(model, "forward")
    watch.around(model, "target_logp")
    total = evaluate(scorer, opened.iterator(), PerplexityReport(opened.task.dictionary))
    return 1 - watch.seconds / total


def training_share(data: Path, folder: Path, updates: int) -> float:
    """Share of training outside forward, backward and the optimizer's step, after ten uncounted updates."""
    from fairseq.options import parse_train, training_configs
    from fairseq.training.loop import TrainingLoop

    words = f"{data} --save-dir {folder} --no-save --cpu --disable-validation {common.SMALL_MODEL}".split()
    loop = TrainingLoop(training_configs(parse_train([*words, "--max-update", str(updates + 10)])))
    step, began = loop.trainer.train_step, [0.0]
    watch = Stopwatch()

    def counted(batches: Any) -> Any:
        if loop.trainer.num_updates == 10:
            began[0], watch.seconds = time.perf_counter(), 0.0
        return step(batches)

    loop.trainer.train_step = counted  # type: ignore[method-assign]
    watch.around(loop.trainer.wrapped, "forward")
    watch.around(loop.trainer.fabric, "backward")
    watch.around(loop.trainer.optimizer, "step")
    loop.run()
    return 1 - watch.seconds / (time.perf_counter() - began[0])


def main() -> None:
    """Measure both shares several times in turn."""
    options = common.parser(__doc__.splitlines()[0], "data", "checkpoint").parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data, checkpoint = common.model_inputs(options, folder, 400_000)
        more = "--max-tokens 256 --max-sentences 1 --context-window 192 --sample-break-mode complete".split()
        shares = [
            (evaluation_share(data, checkpoint, more), training_share(data, folder / "none", 60))
            for _ in range(options.repeats)
        ]
    evaluation, training = (statistics.median(column) for column in zip(*shares))
    details = {"evaluation": evaluation, "training": training, "runs": shares}
    common.tell(
        "overhead",
        "larger share outside of evaluation and training",
        max(evaluation, training),
        "<= 0.1",
        details,
        options.out,
    )
    sys.stdout.write(f"  evaluation {evaluation:.3f}, training {training:.3f}\n")


if __name__ == "__main__":
    main()
