"""From sums over batches to the figures that are reported, under fairseq's names.

``loss`` and its relatives are in bits per token, ``ppl`` is 2 ** loss, ``wps`` tokens per second, ``ups`` updates per
second, ``accuracy`` the percentage of targets that were most probable, ``wpb`` tokens and ``bsz`` blocks per batch (of
an update, all processes together), ``gnorm`` the gradient's mean norm before clipping, ``clip`` the percentage of
updates that were clipped, ``train_wall`` seconds spent in updates, ``wall`` seconds since the run began.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = dict[str, float]


@dataclass(frozen=True)
class StepSums:
    """Sums over the batches of an update or of a validation pass, and over all ranks."""

    loss: float
    """The criterion's loss, in nats."""
    sample_size: float
    """Divisor of the mean loss."""
    num_tokens: float
    """Targets counted."""
    num_sentences: float
    """Blocks."""
    num_batches: float
    """Batches that held anything."""
    log: dict[str, float]
    """Further sums of the criterion."""
    norm: float | None = None
    """Norm of the gradient before clipping."""
    clipped: bool = False
    """True if clipping took effect."""


def perplexity(bits: float) -> float:
    """2 ** bits, infinite where a float cannot hold it."""
    return 2.0**bits if bits < 1024 else math.inf


def loss_figures(sums: Mapping[str, float]) -> Figures:
    """Mean losses in bits, and the perplexity (of ``nll_loss``, where the loss itself is no likelihood)."""
    found = {"loss": _bits(sums["loss"], sums["sample_size"])}
    for name in sorted(sums):
        if name.endswith("loss") and name != "loss":
            found[name] = _bits(sums[name], sums["num_tokens"])
    if "nll_loss" not in found and sums["sample_size"] != sums["num_tokens"]:  # the loss is a mean over sentences
        found["nll_loss"] = _bits(sums["loss"], sums["num_tokens"])
    if "n_correct" in sums:
        found["accuracy"] = 100 * _ratio(sums["n_correct"], sums["num_tokens"])
    found["ppl"] = perplexity(found.get("nll_loss", found["loss"]))
    return found


def _bits(nats: float, count: float) -> float:
    return _ratio(nats, count) / math.log(2)


def _ratio(sum_: float, count: float) -> float:
    return sum_ / count if count else 0.0


def _flat(sums: StepSums) -> dict[str, float]:
    return {
        "loss": float(sums.loss),
        "sample_size": float(sums.sample_size),
        "num_tokens": float(sums.num_tokens),
        "num_sentences": float(sums.num_sentences),
        "num_batches": float(sums.num_batches),
    } | {name: float(value) for name, value in sums.log.items()}


LossFigures = Callable[[Mapping[str, float]], Figures]


def valid_figures(sums: StepSums, seconds: float, num_updates: int, losses: LossFigures = loss_figures) -> Figures:
    """Figures of a validation pass that took so many seconds; ``losses`` makes the criterion's."""
    flat = _flat(sums)
    return losses(flat) | {
        "wps": _ratio(flat["num_tokens"], seconds),
        "wpb": _ratio(flat["num_tokens"], flat["num_batches"]),
        "bsz": _ratio(flat["num_sentences"], flat["num_batches"]),
        "num_updates": num_updates,
    }


class MeterWindow:
    """Sums over the updates since it was opened, and the seconds it was open."""

    def __init__(self, clock: Callable[[], float], losses: LossFigures = loss_figures) -> None:
        self._clock, self._losses = clock, losses
        self.restart()

    def restart(self) -> None:
        """Forget everything; time counts from now."""
        self.sums: dict[str, float] = {}
        self._opened = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds the window has been open, including earlier runs of a resumed epoch."""
        return self._clock() - self._opened

    def add(self, sums: Mapping[str, float]) -> None:
        """Add what one update summed up to."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def figures(self, **now: float) -> Figures:
        """Losses, speed, sizes, what holds ``now``, and gradients; only what holds now before the first update."""
        sums = self.sums
        if not sums:
            return dict(now)
        updates = sums["num_updates"]
        return self._losses(sums) | {
            "wps": _ratio(sums["num_tokens"], self.seconds),
            "ups": _ratio(updates, self.seconds),
            "wpb": sums["num_tokens"] / updates,
            "bsz": sums["num_sentences"] / updates,
            **now,
            "gnorm": sums["gnorm"] / updates,
            "clip": 100 * sums["clipped"] / updates,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums and the seconds, as plain types."""
        return {"sums": dict(self.sums), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the time in between does not count."""
        self.sums = dict(state["sums"])
        self._opened = self._clock() - state["seconds"]


class TrainMeters:
    """The figures of training: of the epoch so far, and of the updates since they were last shown."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, losses: LossFigures = loss_figures) -> None:
        self._epoch, self._inner, self._run = MeterWindow(clock, losses), MeterWindow(clock, losses), MeterWindow(clock)

    def begin_epoch(self) -> None:
        """Start the epoch's figures afresh (not when an epoch is continued)."""
        self._epoch.restart()
        self._inner.restart()

    def add(self, sums: StepSums, seconds: float) -> None:
        """Add an update that took so many seconds."""
        flat = _flat(sums) | {"num_updates": 1.0, "gnorm": sums.norm or 0.0, "clipped": float(sums.clipped)}
        self._epoch.add(flat)
        self._inner.add(flat)
        self._run.add({"train_wall": seconds})

    def inner_figures(self, num_updates: int, lr: float) -> Figures:
        """Figures of the updates since the last call."""
        found = self._with_run(self._inner, num_updates, lr)
        self._inner.restart()
        return found

    def epoch_figures(self, num_updates: int, lr: float) -> Figures:
        """Figures of the epoch so far."""
        return self._with_run(self._epoch, num_updates, lr)

    def _with_run(self, window: MeterWindow, num_updates: int, lr: float) -> Figures:
        walls = {"train_wall": self._run.sums.get("train_wall", 0.0), "wall": self._run.seconds}
        return window.figures(num_updates=num_updates, lr=lr) | walls

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run reports the same figures, as plain types."""
        windows = {"epoch": self._epoch, "inner": self._inner, "run": self._run}
        return {name: window.state_dict() for name, window in windows.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._epoch.load_state_dict(state["epoch"])
        self._inner.load_state_dict(state["inner"])
        self._run.load_state_dict(state["run"])


_DECIMALS = {"ppl": 2, "ups": 2, "wps": 1, "wpb": 1, "bsz": 1, "clip": 1, "train_wall": 0, "wall": 0}


def format_figure(name: str, value: float) -> str:
    """A figure as fairseq writes it: losses with up to 3 decimals, ``ppl`` with 2, others with what they are worth."""
    if isinstance(value, int):
        return str(value)
    if name == "ppl":
        return f"{value:.2f}"
    decimals = 3 if name.endswith(("loss", "gnorm")) else _DECIMALS.get(name)
    if decimals is None or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
