"""What TRIME's loss for translation takes over cross-entropy: time and peak memory of a step, one thread.

The model is left out: its states are given, the output layer is real, and the keys are what it reads. Memory is
measured next to a vocabulary of 100 types, whose scores do not hide it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

TIME_LIMIT, MEMORY_LIMIT = 1.4, 1.1
MAIN = "topk 8"
SETTINGS: dict[str, dict[str, Any]] = {
    MAIN: {"topk_mem": 8, "temp": 10.0},
    "topk 8, l2": {"topk_mem": 8, "temp": 10.0, "dist_func": "l2"},
    "all": {"temp": 10.0},
    "all, l2": {"temp": 10.0, "dist_func": "l2"},
}


def make_batch(num_tokens: int, num_types: int) -> Any:
    """Sentences of 10 to 40 tokens, about 25, drawn as often as words are."""
    import torch

    from fairseq.data.types import LMBatch

    torch.manual_seed(0)
    lengths, left = [], num_tokens
    while left:
        lengths.append(min(left, int(torch.randint(10, 41, ()))))
        left -= lengths[-1]
    scored_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    frequency = 1 / (torch.arange(num_types - 4) + 2.7)
    target_BT = torch.multinomial(frequency, scored_BT.numel(), replacement=True).view(scored_BT.shape) + 4
    return LMBatch(torch.arange(len(lengths)), target_BT, target_BT, scored_BT)


def make_steps(num_tokens: int, options: Any, num_types: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of cross-entropy and of each setting, on states and targets that stay the same."""
    import torch

    from fairseq.criterions.base import build_criterion
    from fairseq.modules.adaptive_softmax import pick

    torch.set_num_threads(1)
    batch = make_batch(num_tokens, num_types)
    output = torch.nn.Linear(options.width, num_types, bias=False)
    state_BTD = torch.randn(*batch.target_BT.shape, options.width, requires_grad=True)
    model: Any = lambda tokens_BT, key_tap=None: SimpleNamespace(hidden_BTD=state_BTD, key_BTD=state_BTD)  # noqa: E731
    model.has_adaptive_softmax, model.training = False, True
    model.key_dim = lambda tap: options.width
    model.target_logp = lambda hidden_ND, target_N: pick(output(hidden_ND), target_N)
    losses = {"cross_entropy": build_criterion("cross_entropy", {}, model)}
    losses |= {name: build_criterion("trime_mt_loss", given, model) for name, given in SETTINGS.items()}

    def step(name: str) -> None:
        losses[name](model, batch).sum.backward()
        state_BTD.grad = output.weight.grad = None

    return {name: lambda name=name: step(name) for name in losses}  # type: ignore[misc]


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Time one thread spends in a call; others on the machine count only as far as they slow it."""
    began = time.process_time()
    call()
    return time.process_time() - began


def times(options: Any) -> dict[str, list[float]]:
    """Seconds of each loss, in turn."""
    steps = make_steps(options.tokens, options, options.types)
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            found[name].append(cpu_seconds(step))
    return found


def added_bytes(name: str, num_tokens: int, options: Any) -> int:
    """Peak resident memory of two steps in a process of their own, less what the process had before."""
    words = [sys.executable, __file__, "--peak-of", name, "--tokens", str(num_tokens), "--width", str(options.width)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout)


def print_peak(options: Any) -> None:
    """Be the process that is measured."""

    def resident(line: str) -> int:  # not getrusage: that starts at what the parent process took
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split(f"{line}:")[1].split()[0]) * 1024

    step = make_steps(options.tokens, options, 100)[options.peak_of]
    before = resident("VmRSS")
    step(), step()
    sys.stdout.write(f"{resident('VmHWM') - before}\n")


def main() -> None:
    """Measure, or (--peak-of) be the process that is measured."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--many", type=int, default=16384, help="tokens of the large batch whose memory is measured")
    parser.add_argument("--types", type=int, default=10000, help="types of the vocabulary")
    parser.add_argument("--width", type=int, default=512, help="width of the states")
    parser.add_argument("--peak-of", help="do two steps of this loss and print the memory they add")
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options)
        return
    seconds = times(options)
    figures: dict[str, Any] = {"seconds": {name: statistics.median(each) for name, each in seconds.items()}}
    for name in SETTINGS:
        figures[name] = common.median_ratio(seconds[name], seconds["cross_entropy"])
        sys.stdout.write(f"  {name}: time {figures[name]:.2f}\n")
    few, many = (added_bytes(MAIN, tokens, options) / tokens for tokens in (options.many // 2, options.many))
    figures |= {"bytes_per_token": [few, many], "growth": many / few, "growth_wanted": f"<= {MEMORY_LIMIT}"}
    sys.stdout.write(f"  {MAIN}: {few:.0f} bytes a token with {options.many // 2}, {many:.0f} with {options.many}\n")
    wanted = f"<= {TIME_LIMIT}"
    common.tell("trime_mt_loss", f"time over cross-entropy, {MAIN}", figures[MAIN], wanted, figures, options.out)


if __name__ == "__main__":
    main()
