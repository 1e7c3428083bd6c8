"""TRIME's joint loss in one pass over strips of the similarity matrix, each turned into gradients at once.

Shapes: N positions, M memories from elsewhere, D key width; R rows and W columns of a strip.

With s the similarities, products of keys (see ``similarity.conjugate``), and everything relative to the vocabulary's
log-sum:

    whole = log(1 + sum of exp(s) over the memories seen)
    target = log(exp(logp) + sum of exp(s) over those that hold the target)
    loss = whole - target
    d loss / d s = exp(s - whole) - exp(s - target) where the memory holds the target

A row of a strip holds all its similarities, so it needs no other strip. Keys are queries too: a strip's gradients
go to its rows and to its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairseq.memory.similarity import conjugate
from fairseq.memory.trime.visibility import Strip, VisibilityRule, VisibleRanges
from fairseq.memory.types import Metric

# Rows of a strip, its bytes, and the width of the stairs that skip what is above the diagonal. On a CPU
# products of fewer than 256 rows lose more speed than the triangle costs; a GPU wants few large products.
_SIZES = {"cpu": (1024, 1 << 26, 256), "cuda": (4096, 1 << 30, 2048)}
# Elements treated at a time: about a CPU's second-level cache, so that several cheap passes cost little.
CHUNK = 1 << 18


@dataclass(frozen=True)
class InBatchMemory:
    """In-batch memory: every position of a training batch is a key, and its target is the value.

    ```python
    from fairseq.memory.trime.visibility import LOCAL  # LONG and EXTERNAL are the other two rules

    in_batch = InBatchMemory(token_N=token_N[:8], lengths=[4, 4], rule=LOCAL, scale=16**-0.5)
    ```
    """

    token_N: Tensor
    """The target of each position, which is the value of its memory."""
    lengths: Sequence[int]
    """Positions in each segment, in order."""
    rule: VisibilityRule
    """Role of the memories for each position: ``LOCAL``, ``LONG`` or ``EXTERNAL``."""
    scale: float
    """Factor of the similarities: 1 / (sqrt(D) * temperature)."""
    other_token_M: Tensor | None = None
    """Values of memories from elsewhere, which every position sees."""
    metric: Metric = Metric.IP
    """Similarity of keys: ``IP``, or ``L2``, minus the squared distance."""
    topk: int | None = None
    """A position sees only so many of its memories, the most similar ones; None for all."""


@dataclass(frozen=True)
class RunningSums:
    """Sums of each position; ``whole_N`` and ``target_N`` grow in place while strips go by."""

    token_N: Tensor
    other_token_M: Tensor | None
    visible: VisibleRanges
    norm_N: Tensor
    """The vocabulary's log-sum."""
    whole_N: Tensor
    """Log-sum of the vocabulary and of the memories seen so far, less ``norm_N``."""
    target_N: Tensor
    """The same over the target alone."""

    @property
    def num_other(self) -> int:
        """Memories from elsewhere; they stand before the batch's own in a strip's columns."""
        return 0 if self.other_token_M is None else len(self.other_token_M)

    def with_rule(self, rule: VisibilityRule, lengths: Sequence[int]) -> RunningSums:
        """The same positions and sums under another rule."""
        visible = rule.visible(lengths, self.norm_N.device)
        return RunningSums(self.token_N, self.other_token_M, visible, self.norm_N, self.whole_N, self.target_N)


@dataclass(frozen=True)
class Gradients:
    """Buffers that collect the keys' gradients, conjugate; None for what needs none."""

    key_ND: Tensor | None
    other_MD: Tensor | None

    @property
    def wanted(self) -> bool:
        """True if there is anything to add to."""
        return self.key_ND is not None or self.other_MD is not None


class StripGradient(Protocol):
    """Lets the rows of a strip see its columns (those from elsewhere first) and turns similarities into gradients."""

    gain: float
    """Factor that keeps the gradients in range; a power of two."""

    def __call__(self, score_RW: Tensor, strip: Strip, needs_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Update the positions' sums.

        Returns the gradients of the similarities, usually in the same memory, and a factor of each row that is still
        to be applied to them (None for 1). Scores where a row sees nothing may be anything.
        """
        ...


def begin(memory: InBatchMemory, logp_N: Tensor, norm_N: Tensor) -> RunningSums:
    """Positions that have seen the vocabulary only."""
    assert len(memory.token_N) == len(logp_N) == sum(memory.lengths), (len(logp_N), memory.lengths)
    visible = memory.rule.visible(memory.lengths, norm_N.device)
    return RunningSums(memory.token_N, memory.other_token_M, visible, norm_N, torch.zeros_like(norm_N), logp_N.clone())


def end(sums: RunningSums, logp_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients with respect to the language model's log-probabilities and log-sums."""
    total = (sums.whole_N - sums.target_N).sum()
    own_share_N = (logp_N - sums.target_N).exp_()  # what the vocabulary gives of the target's mass
    return total, -own_share_N, (-sums.whole_N).exp_().sub_(own_share_N)


def strip_shape(width: int, like: Tensor) -> tuple[int, int]:
    """Rows of a strip of that many columns, and the width of its stairs."""
    max_rows, max_bytes, stair_width = _SIZES["cuda" if like.is_cuda else "cpu"]
    itemsize = torch.promote_types(like.dtype, torch.float32).itemsize
    return max(16, min(max_rows, max_bytes // (itemsize * max(width, 1)))), stair_width


def accumulate_strips(
    memory: InBatchMemory, key_ND: Tensor, other_key_MD: Tensor | None, to_gradient: StripGradient, gradients: Gradients
) -> None:
    """Go through a batch strip by strip, each row of a strip seeing all its memories at once."""
    num_rows = 0
    for strip, parts, score_RW in score_strips(memory, key_ND, other_key_MD, gradients):
        if strip.num_rows > num_rows:
            num_rows = strip.num_rows
            query_buffer = key_ND.new_empty(num_rows, key_ND.shape[1])
            sum_buffer = torch.empty_like(query_buffer, dtype=score_RW.dtype)
        query_RD = key_ND[strip.rows]
        weight_RW, factor_R = to_gradient(score_RW, strip, gradients.wanted)
        if gradients.wanted:
            weighted_RD = query_RD
            if factor_R is not None:
                weighted_RD = torch.mul(query_RD, factor_R[:, None], out=query_buffer[: strip.num_rows])
            sum_RD = sum_buffer[: strip.num_rows]
            _spread(weight_RW, parts, weighted_RD, memory.scale / to_gradient.gain, sum_RD)
            if gradients.key_ND is not None:
                gradients.key_ND[strip.rows] += sum_RD if factor_R is None else sum_RD.mul_(factor_R[:, None])


def score_strips(
    memory: InBatchMemory, key_ND: Tensor, other_key_MD: Tensor | None, gradients: Gradients
) -> Iterator[tuple[Strip, list[Part], Tensor]]:
    """Each strip with its parts and similarities (R, W), which lie in memory that the next strip uses again.

    Columns hold memories from elsewhere first. Similarities that no row sees may be anything.
    """
    num_other = 0 if other_key_MD is None else len(other_key_MD)
    across = memory.rule.earlier or memory.rule.later
    num_rows, stair_width = strip_shape(num_other + (len(key_ND) if across else max(memory.lengths)), key_ND)
    strips = [s for s in memory.rule.strips(memory.lengths, num_rows) if num_other + s.high > s.low]
    if not strips:
        return
    # Made once: the system takes longer to hand out megabytes than they take to fill.
    wide = torch.promote_types(key_ND.dtype, torch.float32)
    buffer = key_ND.new_empty(max(s.num_rows * (num_other + s.high - s.low) for s in strips), dtype=wide)
    for strip in strips:
        width = num_other + strip.high - strip.low
        score_RW = buffer[: strip.num_rows * width].view(strip.num_rows, width)
        parts = []
        if other_key_MD is not None:
            parts.append(Part(slice(None), slice(0, num_other), other_key_MD, gradients.other_MD))
        parts += _own_parts(strip, stair_width, num_other, key_ND, gradients.key_ND)
        query_RD = conjugate(key_ND[strip.rows], memory.metric)
        for part in parts:
            scores(query_RD[part.rows], part.key_WD, memory.scale, score_RW[part.rows, part.columns])
        yield strip, parts, score_RW


@dataclass(frozen=True)
class Part:
    """A block of a strip with the keys of its columns, and where their gradients go."""

    rows: slice
    columns: slice
    key_WD: Tensor
    grad_WD: Tensor | None


def _own_parts(strip: Strip, stair_width: int, num_other: int, key_ND: Tensor, grad_ND: Tensor | None) -> list[Part]:
    left = num_other - strip.low
    found = []
    for rows, columns in strip.pieces(stair_width) if strip.high > strip.low else ():
        inside = slice(rows.start - strip.start, rows.stop - strip.start)
        grad_WD = None if grad_ND is None else grad_ND[columns]
        place = slice(left + columns.start, left + columns.stop)
        found.append(Part(inside, place, key_ND[columns], grad_WD))
    return found


def _spread(weight_RW: Tensor, parts: list[Part], query_RD: Tensor, scale: float, sum_RD: Tensor) -> None:
    """Hand a strip's weights on: to its columns' gradients, and to its rows' in ``sum_RD``, which is overwritten."""
    for part in parts:
        part_RW = weight_RW[part.rows, part.columns]
        add_product(sum_RD[part.rows], part_RW, part.key_WD, scale, overwrite=part is parts[0])  # it has all rows
        if part.grad_WD is not None:
            add_product(part.grad_WD, part_RW.t(), query_RD[part.rows], scale)


def can_widen(key_ND: Tensor) -> bool:
    """True if such keys can be multiplied in float32 without a copy of the keys (CUDA, PyTorch 2.8 and later)."""
    return key_ND.dtype == torch.float32 or (key_ND.is_cuda and "dtype" in torch.ops.aten.mm.overloads())  # type: ignore[no-untyped-call]


def scores(query_RD: Tensor, key_WD: Tensor, scale: float, out_RW: Tensor) -> None:
    """``out = scale * query @ key.T``, summed and stored in the precision of ``out``."""
    if query_RD.dtype == out_RW.dtype:
        add_product(out_RW, query_RD, key_WD.t(), scale, overwrite=True)
        return
    exact = math.frexp(scale)[0] == 0.5  # a power of two: scaling narrow numbers by it loses nothing
    out_RW.copy_(torch.mm(query_RD * scale if exact else query_RD, key_WD.t(), out_dtype=out_RW.dtype))
    if not exact:
        out_RW *= scale


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float, *, overwrite: bool = False) -> None:
    """``out += scale * left @ right``, summed in the precision of ``out``."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=0 if overwrite else 1, alpha=scale, out=out)
        return
    product = torch.mm(left, right, out_dtype=out.dtype)
    if overwrite:
        torch.mul(product, scale, out=out)
    else:
        out.add_(product, alpha=scale)
