"""What TRIME's losses take over adaptive_loss alone: time and peak memory of a step of the criterion, one thread.

The model is left out: features and keys are given, the softmax is real. The limits are for types drawn evenly. Drawn as
often as words of a text (zipf), most are in the softmax's head: it has less to do and the ratios are larger, which is
measured and told as well. There the past pairs of trime_long_loss alone are as many operations as adaptive_loss.
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

LOSSES = {"local": ("trime_loss", 1.3), "long": ("trime_long_loss", 1.7), "ext": ("trime_ext_loss", 2.5)}
MEMORY_LIMIT = 1.3
NUM_TYPES, CUTOFF = 17552, (2000, 8000)
DRAWN = ("even", "zipf")


def make_step(criterion_name: str, num_tokens: int, options: Any, drawn: str) -> Callable[[], Any]:
    """Forward and backward of a criterion on features, keys and targets that stay the same."""
    width, segment = options.width, options.segment
    import torch

    from fairseq.criterions.base import build_criterion
    from fairseq.data.types import LMBatch
    from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

    torch.set_num_threads(1)
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(NUM_TYPES, width, CUTOFF)
    softmax.reset_parameters()
    shape = (num_tokens // segment, segment)
    features_BTD, keys_BTD = (torch.randn(*shape, width, requires_grad=True) for _ in range(2))
    rank = torch.arange(NUM_TYPES - 4)
    frequency = 1 / (rank + 2.7) if drawn == "zipf" else torch.ones(NUM_TYPES - 4)
    target_BT = torch.multinomial(frequency, num_tokens, replacement=True).view(shape) + 4
    batch = LMBatch(torch.arange(shape[0]), target_BT, target_BT, torch.ones(shape, dtype=torch.bool))
    model: Any = lambda tokens_BT, key_tap=None: SimpleNamespace(hidden_BTD=features_BTD, key_BTD=keys_BTD)  # noqa: E731
    model.has_adaptive_softmax, model.training = True, True
    model.key_dim, model.target_logp = lambda tap: width, softmax.target_logp
    criterion = build_criterion(criterion_name, {}, model)

    def step() -> None:
        criterion(model, batch).sum.backward()
        for x in (features_BTD, keys_BTD, *softmax.parameters()):
            x.grad = None

    return step


def processor_seconds(call: Callable[[], Any]) -> float:
    """Time one thread spends in a call; others on the machine count only as far as they slow it."""
    began = time.process_time()
    call()
    return time.process_time() - began


def times(options: Any, drawn: str) -> dict[str, list[float]]:
    """Seconds of each loss, in turn."""
    names = ["adaptive_loss", *(name for name, _ in LOSSES.values())]
    steps = {name: make_step(name, options.tokens, options, drawn) for name in names}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, step in steps.items():
            found[name].append(processor_seconds(step))
    return found


def peak_bytes(name: str, num_tokens: int, options: Any, drawn: str) -> int:
    """Peak resident memory of a process that does two steps."""
    words = [sys.executable, __file__, "--peak-of", name, "--tokens", str(num_tokens), "--drawn", drawn]
    words += ["--width", str(options.width), "--segment", str(options.segment)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def compare(options: Any, drawn: str) -> tuple[dict[str, Any], float]:
    """Figures of each loss, and the largest of them over its limit."""
    seconds = times(options, drawn)
    base = peak_bytes("adaptive_loss", options.tokens, options, drawn)
    figures: dict[str, Any] = {"adaptive_loss": {"seconds": statistics.median(seconds["adaptive_loss"]), "peak": base}}
    worst = 0.0
    for short, (name, limit) in LOSSES.items():
        ratio = common.median_ratio(seconds[name], seconds["adaptive_loss"])
        peak = peak_bytes(name, options.tokens, options, drawn)
        figures[name] = {"seconds": statistics.median(seconds[name]), "time": ratio, "time_wanted": limit}
        figures[name] |= {"peak": peak, "memory": peak / base, "memory_wanted": MEMORY_LIMIT}
        worst = max(worst, ratio / limit, peak / base / MEMORY_LIMIT)
        told = f"time {ratio:.2f} (wanted: <= {limit}), memory {peak / base:.2f} (wanted: <= {MEMORY_LIMIT})"
        sys.stdout.write(f"  {drawn} {short}: {told}\n")
    return figures, worst


def main() -> None:
    """Measure, or (--peak-of) be the process that is measured."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024, help="width of features and keys")
    parser.add_argument("--segment", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--many", type=int, default=32768, help="tokens of the large batch for trime_ext_loss")
    parser.add_argument("--drawn", choices=DRAWN, default=DRAWN[0], help="how often types are drawn, with --peak-of")
    parser.add_argument("--peak-of", help="do two steps of this loss and print the peak memory")
    options = parser.parse_args()
    if options.peak_of:
        step = make_step(options.peak_of, options.tokens, options, options.drawn)
        step(), step()
        # Not getrusage: that starts at what the parent process took.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        sys.stdout.write(f"{int(status.split('VmHWM:')[1].split()[0]) * 1024}\n")
        return
    found = {drawn: compare(options, drawn) for drawn in DRAWN}
    figures: dict[str, Any] = {drawn: each for drawn, (each, _) in found.items()}
    worst = found["even"][1]
    if options.many:
        many = peak_bytes("trime_ext_loss", options.many, options, "even")
        figures["many"] = {"tokens": options.many, "peak": many, "wanted": 4 << 30}
        worst = max(worst, many / (4 << 30))
        sys.stdout.write(f"  ext with {options.many} tokens: {many / 2**30:.2f} GB (wanted: <= 4)\n")
    common.tell("trime_loss", "largest figure over what is wanted of it, even", worst, "<= 1", figures, options.out)


if __name__ == "__main__":
    main()
