"""What was found at the positions that were checked, and the verdicts on it.

Shapes: N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq.metrics.verdicts import Verdict

MASS = 1e-5
"""Largest deviation from 1 of the sum of the probabilities that a model in float32 gives."""
HALF_MASS = 1e-2
"""The same for weights of 16 bits, whose logits are rounded."""
ROUNDED = 1e-3
"""The same where the sum in float64 is 1: scores in the thousands, as of a small temperature, round that much in
float32."""
REPORTED = 1e-4
"""Largest difference of a log-probability computed once more, alone, from the one that the figures are of: a batch of
another shape rounds differently."""
HALF_REPORTED = 0.1


def is_in_half(models: Iterable[Any]) -> bool:
    """True if weights of a model have 16 bits."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for model in models for p in model.parameters())


def rounding_of(models: Iterable[Any]) -> float:
    """Relative difference that later tokens may make by rounding, for some models.

    Adaptive inputs and softmaxes, and mixtures of experts, compute positions together by their tokens.
    """
    models = list(models)
    by_tokens = any(
        getattr(model, "has_adaptive_softmax", False)
        or getattr(model.config, "adaptive_input", False)
        or any(value for name, value in vars(model.config).items() if name.endswith("experts"))
        for model in models
    )
    return (HALF_REPORTED if is_in_half(models) else REPORTED) if by_tokens else 0.0


@dataclass
class MassTally:
    """Sums of probabilities over the vocabulary, and whether the reported scores are of these distributions."""

    in_half: bool = False
    """True for a model of 16 bits."""
    masses: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    """Of the reported log-probability and the one of the same distribution."""
    num_tied: int = 0
    """Positions whose neighbours hang on rounding (``ties.py``), and whose reported scores are not compared."""

    num_rounded: int = 0
    """Sums that are 1 in float64, and in float32 not quite."""
    largest_rounding: float = 0.0
    """Of these in float32, the largest deviation from 1."""

    def add(self, mass: float, wide: Callable[[], float]) -> None:
        """Take in the sum at a position.

        Args:
            wide: gives the sum of the same numbers in float64; asked only where the first one is off by little.
        """
        off = abs(mass - 1.0)
        if self.tolerance < off <= ROUNDED and abs((exact := wide()) - 1.0) <= self.tolerance:
            self.num_rounded += 1
            self.largest_rounding = max(self.largest_rounding, off)
            mass = exact
        self.masses.append(mass)

    @property
    def tolerance(self) -> float:
        """Largest deviation of a sum from 1."""
        return HALF_MASS if self.in_half else MASS

    @property
    def reported_tolerance(self) -> float:
        """Largest difference of a reported score."""
        return HALF_REPORTED if self.in_half else REPORTED

    def compare(self, own: float, reported: float, is_tied: Callable[[], bool] = lambda: False) -> None:
        """Compare a log-probability with the one that was reported.

        Args:
            is_tied: tells whether another one is no wonder; asked only where they differ.
        """
        difference = 0.0 if own == reported else abs(own - reported)
        if not difference <= self.reported_tolerance and is_tied():
            self.num_tied += 1
        else:
            self.differences.append(difference)

    def verdict(self, hint: str = "") -> Verdict:
        """The answer; ``hint`` is the way out of a sum that is not 1."""
        if not self.masses:
            return Verdict("mass", None, "no position was checked")
        off = [abs(mass - 1.0) for mass in self.masses]
        worst = self.masses[max(range(len(off)), key=lambda n: off[n] if off[n] == off[n] else float("inf"))]
        difference = max(self.differences, default=0.0)
        sums = all(x <= self.tolerance for x in off)
        same = all(x <= self.reported_tolerance for x in self.differences)
        mean = sum(self.masses) / len(self.masses)
        if sums:
            words = f"the probabilities sum to 1 within {max(off):.1e} at {len(off)} positions"
        else:
            words = (
                f"the probabilities sum to {mean:.6g} in the mean of {len(off)} positions, at worst {worst:.6g}: a "
                "perplexity of them is none" + (f"; {hint}" if hint else "")
            )
        if self.num_rounded:
            words += f" ({self.num_rounded} in float64: in float32 they round by up to {self.largest_rounding:.1e})"
        if self.differences:
            words += f"; the scores reported differ from theirs by at most {difference:.1e}"
        if self.num_tied:
            words += f" ({self.num_tied} with neighbours at one distance are left out)"
        figures = {
            "largest_deviation": max(off),
            "mean": mean,
            "worst": worst,
            "num_positions": len(off),
            "tolerance": self.tolerance,
            "num_rounded": self.num_rounded,
            "largest_rounding": self.largest_rounding,
            "largest_difference": difference,
            "num_tied": self.num_tied,
            "difference_tolerance": self.reported_tolerance,
        }
        return Verdict("mass", sums and same, words, figures)


@dataclass
class CausalityTally:
    """Whether anything at or before a position changes with the tokens after it."""

    rounding: float = 0.0
    """Largest difference, of numbers up to 1 or relative to larger ones, that is rounding: 0 where nothing that is
    computed together with a position depends on later tokens."""
    num_compared: int = 0
    num_cuts: int = 0
    num_changed: int = 0
    largest: float = 0.0
    first_changed: str = ""

    def compare(self, what: str, before: Tensor, after: Tensor, lag: int = 0, rounding: float = 0.0) -> None:
        """Compare values of positions up to a cut; infinity equals itself, and nan too.

        Args:
            what: name of the values.
            before: of the text, (N, ...).
            after: of the text with other tokens after the cut.
            lag: how far the last of them is before the cut.
            rounding: what these values may differ by at least, as ``rounding`` of the tally.
        """
        self.num_compared += len(before)
        if torch.equal(before, after):
            return
        before, after = before.double(), after.double()
        equal = (before == after) | (torch.isnan(before) & torch.isnan(after))
        off = (before - after).abs().masked_fill(equal, 0.0).nan_to_num(torch.inf, torch.inf)
        finite = before[torch.isfinite(before)]
        off_N = off.flatten(1).amax(1) if off.dim() > 1 else off
        self.largest = max(self.largest, float(off_N.max()))
        scale = max(1.0, float(finite.abs().max()) if len(finite) else 1.0)
        changed = (off_N > max(rounding, self.rounding) * scale).nonzero()[:, 0].tolist()
        self.num_changed += len(changed)
        if changed and not self.first_changed:
            self.first_changed = f"{what} {len(off_N) - 1 - changed[0] + lag} positions before the change"

    def verdict(self) -> Verdict:
        """The answer."""
        if not self.num_cuts:
            return Verdict("causality", None, "no position was checked")
        figures = {
            "num_cuts": self.num_cuts,
            "num_compared": self.num_compared,
            "num_changed": self.num_changed,
            "largest": self.largest,
            "tolerance": self.rounding,
        }
        if self.num_changed:
            words = (
                f"later tokens changed {self.num_changed} of {self.num_compared} values by up to {self.largest:.2g}, "
                f"first {self.first_changed}: scores see the future"
            )
            return Verdict("causality", False, words, figures)
        how = f"within rounding of {self.largest:.1e}" if self.largest else "bit for bit"
        words = f"other tokens after {self.num_cuts} positions left all {self.num_compared} values before alike, {how}"
        return Verdict("causality", True, words, figures)


@dataclass
class OrderTally:
    """Whether the memories held only what came before."""

    num_checked: int = 0
    num_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)

    def see(self, visible_M: Tensor, pasts: list[Tensor], where: str) -> None:
        """Compare the tokens that a memory of the text offers with texts that end before the position.

        Args:
            visible_M: the tokens, in the order of the memory.
            pasts: the texts that it may be a part of.
            where: the position, in words.
        """
        self.num_checked += 1
        self.num_tokens += len(visible_M)
        if not any(_is_part(visible_M, past) for past in pasts):
            self.wrong.append(f"{len(visible_M)} tokens offered {where} do not stand so in the text before it")

    def see_store(self, name: str, rows_before: int, rows_after: int, largest_row: int) -> None:
        """Compare a datastore's size before and after the run."""
        self.stores.append(f"{name} had {rows_before} rows before and after")
        if rows_after != rows_before or largest_row >= rows_before:
            self.stores.pop()
            rows = max(rows_after, largest_row + 1)
            self.wrong.append(f"{name} had {rows_before} rows at the start and {rows} at the end")

    def verdict(self) -> Verdict:
        """The answer."""
        figures = {"num_checked": self.num_checked, "num_tokens": self.num_tokens, "wrong": self.wrong}
        if self.wrong:
            return Verdict("order", False, "; ".join(self.wrong[:3]), figures)
        said = list(self.stores)
        if self.num_checked:
            said.insert(
                0, f"all {self.num_tokens} tokens that memories of the text offered stand before their position"
            )
        if not said:
            return Verdict("order", None, "there is no memory", figures)
        return Verdict("order", True, "; ".join(said), figures)


def _is_part(part_M: Tensor, whole_N: Tensor) -> bool:
    """True if some tokens stand in a text, one after the other."""
    part, whole = (x.to("cpu", torch.int64).contiguous().numpy().tobytes() for x in (part_M, whole_N))
    place = whole.rfind(part)
    while place > 0 and place % 8:
        place = whole.rfind(part, 0, place + len(part) - 1)
    return place >= 0
