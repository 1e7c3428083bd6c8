"""A training step of GPT-2's shape has at least 1.2 times the tokens/s of transformers' model, with the same losses.

The shape is GPT-2 small's cut to four layers (width 768, 50,257 types, tied, plain softmax), in float32. Both sides
start from the same weights and see the same batches, clip gradients to norm 1 and use PyTorch's fused AdamW, which is
what transformers' Trainer uses by default. Ours is the step of train.py; theirs the bare loop without Trainer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import gpt2_inputs

sys.path.insert(0, str(common.ROOT))

LARGEST_DIFFERENCE = 1e-4
LR = 5e-5
OPTIMIZER = f"--optimizer adam --adam-betas (0.9,0.999) --adam-eps 1e-8 --lr {LR} --lr-scheduler fixed --clip-norm 1.0"


def own_loop(data: Path, options: Any, updates: int) -> Any:
    """The training loop that train.py makes."""
    from fairseq.options import parse_train, training_configs
    from fairseq.training.loop import TrainingLoop

    words = f"{data} --no-save --cpu --disable-validation --criterion cross_entropy {gpt2_inputs.SHAPE} {OPTIMIZER} "
    words += f"--tokens-per-sample {options.length} --max-tokens {options.tokens} --max-update {updates}"
    return TrainingLoop(training_configs(parse_train(words.split())))


def peer_step(model: Any) -> Callable[[Any], float]:
    """transformers' update from a batch; returns the loss per token."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True)
    model.train()

    def step(batch: Any) -> float:
        loss = model(input_ids=batch.tokens_BT, labels=batch.target_BT, shift_labels=batch.target_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> None:
    """Train both in turn."""
    made = common.parser(__doc__)
    made.add_argument("--tokens", type=int, default=1024, help="tokens of a batch")
    made.add_argument("--length", type=int, default=256, help="tokens of a block")
    made.add_argument("--updates", type=int, default=20)
    options = made.parse_args()
    seconds: tuple[list[float], list[float]] = ([], [])
    losses: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        loop = own_loop(gpt2_inputs.make_data(Path(folder), 1_100_000), options, options.updates)
        theirs = gpt2_inputs.peer()
        loop.model.load_state_dict(gpt2_inputs.weights_of(theirs))
        other, pair = peer_step(theirs), [0.0, 0.0]
        batches = (batch for batch in loop.iterator if batch.num_scored == options.tokens)
        for _, batch in zip(range(options.updates), batches):

            def own(batch: Any = batch) -> None:
                sums = loop.trainer.train_step([batch])
                pair[0] = sums.loss / sums.sample_size

            def peer(batch: Any = batch) -> None:
                pair[1] = other(batch)

            seconds[0].append(common.seconds(own))
            seconds[1].append(common.seconds(peer))
            losses.append((pair[0], pair[1]))
    apart = max(abs(a - b) for a, b in losses)
    ours, peers = (times[2:] for times in seconds)  # the first updates make optimizer states and kernels
    speeds = [options.tokens / statistics.median(times) for times in (ours, peers)]
    details = {"own_seconds": ours, "transformers_seconds": peers, "own_tokens_per_s": speeds[0]}
    details |= {"transformers_tokens_per_s": speeds[1], "losses": losses, "largest_difference": apart}
    ratio = common.median_ratio(peers, ours)
    what = "a training step's tokens/s over transformers'"
    common.tell("train_step", what, ratio, ">= 1.2", details, options.out)
    sys.stdout.write(f"  {speeds[0]:.0f} and {speeds[1]:.0f} tokens/s; losses apart by at most {apart:.1e}\n")
    if apart > LARGEST_DIFFERENCE:
        raise SystemExit(f"the losses of {len(losses)} updates differ by {apart:.1e}, more than {LARGEST_DIFFERENCE}")


if __name__ == "__main__":
    main()
