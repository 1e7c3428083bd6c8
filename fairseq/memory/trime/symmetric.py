"""TRIME's joint loss where segments see each other: one product serves both directions of a pair of segments.

Keys are queries, so the similarity of n and m is that of m and n. Half of the matrix is computed twice, once for the
log-sums and once for the gradients, instead of all of it once: 4 units of work (of N * N * D) where
``streaming.accumulate_strips`` takes 6. Positions of the same segment, where only one direction counts, take that way.

Shapes: N positions, D key width; R rows and W columns of a strip, P pairs of positions of the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fairseq.memory.scoring import LOWEST
from fairseq.memory.similarity import conjugate
from fairseq.memory.trime.streaming import (
    CHUNK,
    Gradients,
    InBatchMemory,
    RunningSums,
    accumulate_strips,
    add_product,
    begin,
    end,
    scores,
    strip_shape,
)
from fairseq.memory.trime.strip_gradients import EagerStripGradient, row_groups
from fairseq.memory.trime.token_index import TokenPositions
from fairseq.memory.trime.visibility import LOCAL, SegmentStrip, segment_strips

# All rows share one exponent as shift. Within these bounds nothing that counts over- or underflows in float32.
_MAX_ABOVE = 80.0
_MIN_LOGP = -60.0


def accumulate_symmetric(
    memory: InBatchMemory, key_ND: Tensor, logp_N: Tensor, norm_N: Tensor, needs_key_grad: bool
) -> tuple[Tensor, list[Tensor | None]] | None:
    """Loss and gradients under a rule by which segments see each other.

    Returns None where scores are spread too widely; ``accumulate_strips`` then takes longer but loses nothing.
    """
    if not len(key_ND) or not logp_N.min() >= _MIN_LOGP:
        return None
    sums = begin(memory, logp_N, norm_N)
    pairs = _Pairs(memory, key_ND, norm_N)
    pairs.accumulate(sums)
    if not pairs.in_range(sums):
        return None
    gradients = Gradients(torch.zeros_like(key_ND) if needs_key_grad else None, None)
    if memory.rule.own_past:
        own = replace(memory, rule=LOCAL)
        accumulate_strips(
            own, key_ND, None, EagerStripGradient(sums.with_rule(LOCAL, memory.lengths), LOCAL), gradients
        )
    if gradients.key_ND is not None:
        if not pairs.in_range(sums):
            return None
        pairs.spread(sums, gradients.key_ND)
    total, logp_grad_N, norm_grad_N = end(sums, logp_N)
    return total, [gradients.key_ND, logp_grad_N, norm_grad_N, None]


class _Pairs:
    """Strips of positions against the segments before theirs."""

    def __init__(self, memory: InBatchMemory, key_ND: Tensor, norm_N: Tensor) -> None:
        self.key_ND, self.scale = key_ND, memory.scale
        self.conjugate_ND = conjugate(key_ND, memory.metric)
        num_rows, self.stair_width = strip_shape(len(key_ND), key_ND)
        self.strips = list(segment_strips(memory.lengths, num_rows))
        sizes = ((strip.rows.stop - strip.rows.start) * strip.width for strip in self.strips)
        self.buffer = key_ND.new_empty(max(sizes, default=0))
        before_N = LOCAL.visible(memory.lengths, key_ND.device).first_N
        self.places = TokenPositions(memory.token_N)
        self.first_N, self.count_N = self.places.between(memory.token_N, 0, before_N)
        self.shift = norm_N.min()
        self.above_N = norm_N - self.shift

    def in_range(self, sums: RunningSums) -> bool:
        """True if no log-sum is too far above the shift (or not a number)."""
        return bool((self.above_N + sums.whole_N).max() <= _MAX_ABOVE)

    def accumulate(self, sums: RunningSums) -> None:
        """Let all positions see each other."""
        sum_N, hit_N = torch.zeros_like(self.above_N), torch.zeros_like(self.above_N)
        ones_N = torch.ones_like(sum_N)

        def add_up(exp_RW: Tensor, rows: slice, width: int) -> None:
            sum_N[rows].addmv_(exp_RW, ones_N[:width])
            sum_N[:width].addmv_(exp_RW.t(), ones_N[rows])

        for strip in self.strips:
            exp_RW = self._exponentiate(strip, add_up)
            for rows, row_P, column_P, flat_P in self._same_token(strip):
                exp_P = exp_RW.view(-1).index_select(0, flat_P)
                hit_N[rows].scatter_add_(0, row_P, exp_P)
                hit_N.scatter_add_(0, column_P, exp_P)
        torch.logaddexp(sums.whole_N, sum_N.log_() - self.above_N, out=sums.whole_N)
        torch.logaddexp(sums.target_N, hit_N.log_() - self.above_N, out=sums.target_N)

    def spread(self, sums: RunningSums, grad_ND: Tensor) -> None:
        """Add the keys' gradients once all sums are final."""
        whole_N = (-self.above_N - sums.whole_N).exp_()
        target_N = (-self.above_N - sums.target_N).exp_()

        def write_gradient(exp_RW: Tensor, rows: slice, width: int) -> None:
            exp_RW *= torch.add(whole_N[rows, None], whole_N[:width])

        for strip in self.strips:
            weight_RW = self._exponentiate(strip, write_gradient)
            for rows, row_P, column_P, flat_P in self._same_token(strip):
                share_P = weight_RW.view(-1).index_select(0, flat_P)
                share_P /= whole_N[rows].index_select(0, row_P).add_(whole_N.index_select(0, column_P))
                share_P *= target_N[rows].index_select(0, row_P).add_(target_N.index_select(0, column_P))
                weight_RW.view(-1).scatter_add_(0, flat_P, share_P.neg_())
            for inside, rows, columns in self._pieces(strip):
                part_RW = weight_RW[inside, columns]
                add_product(grad_ND[rows], part_RW, self.key_ND[columns], self.scale)
                add_product(grad_ND[columns], part_RW.t(), self.key_ND[rows], self.scale)

    def _pieces(self, strip: SegmentStrip) -> Iterator[tuple[slice, slice, slice]]:
        """Rows within the strip, rows and columns within the batch of each block that is computed."""
        start = strip.rows.start
        for rows, columns in strip.pieces(self.stair_width):
            yield slice(rows.start - start, rows.stop - start), rows, columns

    def _exponentiate(self, strip: SegmentStrip, visit: Callable[[Tensor, slice, int], None]) -> Tensor:
        """``exp(score - shift)`` of a strip, 0 where a row does not see.

        ``visit(exp_RW, rows, width)`` gets a few rows at a time, as wide as they see, and may change them in place.
        """
        num_rows, width = strip.rows.stop - strip.rows.start, strip.width
        exp_RW = self.buffer[: num_rows * width].view(num_rows, width)
        for inside, rows, columns in self._pieces(strip):
            scores(self.conjugate_ND[rows], self.key_ND[columns], self.scale, exp_RW[inside, columns])
        step = max(1, CHUNK // width)
        for start, stop, seen in strip.spans:
            for top in range(start, stop, step):
                rows = slice(top, min(top + step, stop))
                chunk_RW = exp_RW[rows.start - strip.rows.start : rows.stop - strip.rows.start]
                chunk_RW[:, seen:].zero_()
                chunk_RW = chunk_RW[:, :seen]
                chunk_RW.sub_(self.shift).clamp_(min=LOWEST).exp_()
                visit(chunk_RW, rows, seen)
        return exp_RW

    def _same_token(self, strip: SegmentStrip) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Pairs of the same token, some rows at a time: these rows, each pair's row, column and place in the strip."""
        for rows in row_groups(self.count_N, strip.rows):
            row_P, column_P = self.places.pairs(self.first_N[rows], self.count_N[rows])
            flat_P = column_P.add(row_P, alpha=strip.width).add_((rows.start - strip.rows.start) * strip.width)
            yield rows, row_P, column_P, flat_P
