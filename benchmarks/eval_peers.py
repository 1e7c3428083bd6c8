"""Evaluation of a model of GPT-2's shape against a bare loop of transformers: its forward pass and cross-entropy.

The shape is that of train_step.py, in float32, with the same weights on both sides and the same batches. The peer runs
in a process of its own as its users run it; ours sets the allocator as our commands do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import gpt2_inputs
import train_step

sys.path.insert(0, str(common.ROOT))


def peer(batches: list[tuple[Any, Any]]) -> Callable[[], float]:
    """The loop, as a call that returns the loss per token in nats."""
    import torch
    import torch.nn.functional as F

    model = gpt2_inputs.peer().eval()

    def run() -> float:
        total, count = 0.0, 0
        with torch.inference_mode():
            for tokens_BT, target_BT in batches:
                logits_BTV = model(input_ids=torch.from_numpy(tokens_BT)).logits
                target_N = torch.from_numpy(target_BT).flatten()
                total += F.cross_entropy(logits_BTV.flatten(0, 1), target_N, reduction="sum").item()
                count += len(target_N)
        return total / count

    return run


def main() -> None:
    """Evaluate on both sides in turn."""
    made = common.parser(__doc__)
    made.add_argument("--tokens", type=int, default=1024, help="tokens of a batch")
    made.add_argument("--length", type=int, default=256, help="tokens of a block")
    made.add_argument("--batches", type=int, default=4)
    options = made.parse_args()
    from fairseq.evaluation.loop import evaluate
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.sequence_scorer import SequenceScorer
    from fairseq_cli.entry import keep_freed_memory

    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        loop = train_step.own_loop(gpt2_inputs.make_data(Path(folder), 1_100_000), options, 1)
        whole = (batch for batch in loop.iterator if batch.num_scored == options.tokens)
        batches = [batch for _, batch in zip(range(options.batches), whole)]
        dictionary = loop.task.dictionary
    scorer, losses = SequenceScorer([gpt2_inputs.own()], softmax_batch=1024), [0.0, 0.0]

    def own() -> None:
        report = PerplexityReport(dictionary)
        evaluate(scorer, iter(batches), report)
        losses[0] = -float(report.arrays()[2].mean())

    arrays = [(batch.tokens_BT.numpy(), batch.target_BT.numpy()) for batch in batches]
    with common.in_own_process(peer, arrays) as bare:

        def theirs() -> None:
            losses[1] = bare()

        seconds, other = common.in_turn(own, theirs, options.repeats)
    details = {"own_seconds": seconds, "transformers_seconds": other, "losses": losses}
    ratio = common.median_ratio(other, seconds)
    common.tell("eval_peers", "a bare transformers loop's seconds over ours", ratio, ">= 1", details, options.out)
    sys.stdout.write(f"  {options.tokens * options.batches} tokens; losses apart by {abs(losses[0] - losses[1]):.1e}\n")


if __name__ == "__main__":
    main()
