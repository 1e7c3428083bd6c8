"""Turning a strip of similarities into gradients with PyTorch's own operations, on any device.

Shapes: N positions, R rows and W columns of a strip, P pairs of a position and a memory that holds its target.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fairseq.memory.scoring import LOWEST
from fairseq.memory.trime.streaming import CHUNK, RunningSums
from fairseq.memory.trime.token_index import TokenPositions
from fairseq.memory.trime.visibility import Strip, VisibilityRule

_MAX_PAIRS = 1 << 20
_MAX_CHUNK_ROWS = 128


class EagerStripGradient:
    """See ``streaming.StripGradient``; a row is shifted by its largest exponent, so no score over- or underflows."""

    gain = 1.0

    def __init__(self, sums: RunningSums, rule: VisibilityRule) -> None:
        self.sums = sums
        visible, token_N = sums.visible, sums.token_N
        # Under a rule that stays within segments, the same token in another segment is another token: fewer pairs.
        if len(token_N) and not rule.later:
            token_N = token_N + visible.first_N * (token_N.max() + 1)
        places = TokenPositions(token_N)
        self.runs = [(places, *places.between(token_N, visible.first_N, visible.past_N), False)]
        if rule.later:
            self.runs.append((places, *places.between(token_N, visible.later_N, len(token_N)), False))
        if sums.other_token_M is not None:
            others = TokenPositions(sums.other_token_M)
            self.runs.append((others, *others.between(sums.token_N, 0, sums.num_other), True))
        self.above_diagonal = sums.norm_N.new_full((_MAX_CHUNK_ROWS, _MAX_CHUNK_ROWS), -torch.inf).triu()
        self.num_pairs_N = sum((count_N for _, _, count_N, _ in self.runs), torch.zeros_like(token_N))

    def __call__(self, score_RW: Tensor, strip: Strip, needs_weights: bool) -> tuple[Tensor, Tensor | None]:
        """See ``streaming.StripGradient``."""
        factor_R = score_RW.new_empty(strip.num_rows)
        for rows in row_groups(self.num_pairs_N, strip.rows):
            inside = slice(rows.start - strip.start, rows.stop - strip.start)
            self._weigh_rows(score_RW[inside], rows, strip, factor_R[inside], needs_weights)
        return score_RW, factor_R

    def _weigh_rows(self, score_RW: Tensor, rows: slice, strip: Strip, factor_R: Tensor, needs_weights: bool) -> None:
        sums = self.sums
        norm_R, whole_R, target_R = sums.norm_N[rows], sums.whole_N[rows], sums.target_N[rows]
        row_P, flat_P = self._same_token(rows, score_RW.shape[1], sums.num_other - strip.low)
        flat_score = score_RW.view(-1)
        hit_P = flat_score.index_select(0, flat_P) - norm_R.index_select(0, row_P)
        torch.logaddexp(target_R, sum_by_row(hit_P, row_P, len(norm_R)), out=target_R)
        shift_R, sum_R = self._exponentiate(score_RW, rows, strip)
        shift_R -= norm_R
        torch.logaddexp(whole_R, sum_R.log_().add_(shift_R), out=whole_R)
        torch.sub(shift_R, whole_R, out=factor_R).exp_()
        if needs_weights:
            share_P = (hit_P - target_R.index_select(0, row_P)).exp_() / factor_R.index_select(0, row_P)
            flat_score.scatter_add_(0, flat_P, share_P.neg_())

    def _exponentiate(self, score_RW: Tensor, rows: slice, strip: Strip) -> tuple[Tensor, Tensor]:
        """Make ``exp(score - shift)`` in place, 0 where a row does not see; returns the shifts and the rows' sums."""
        norm_R = self.sums.norm_N[rows]
        shift_R, sum_R = torch.empty_like(norm_R), torch.empty_like(norm_R)
        left = self.sums.num_other - strip.low
        step = max(1, min(CHUNK // score_RW.shape[1], _MAX_CHUNK_ROWS))
        for top in range(0, len(norm_R), step):
            inside = slice(top, min(top + step, len(norm_R)))
            here = slice(rows.start + inside.start, rows.start + inside.stop)
            chunk_RW = score_RW[inside]
            if strip.causal:  # no row of the chunk sees beyond the chunk's last position
                chunk_RW[:, left + here.stop :].zero_()
                chunk_RW = chunk_RW[:, : left + here.stop]
                mixed_RW = chunk_RW[:, left + here.start :]
                mixed_RW.tril_(-1).add_(self.above_diagonal[: len(chunk_RW), : len(chunk_RW)])
            else:
                mixed_RW = chunk_RW[:, left + strip.mixed[0] : left + strip.mixed[1]]
                unseen_RW = ~self.sums.visible.mask(here, slice(*strip.mixed))
                mixed_RW.masked_fill_(unseen_RW, -torch.inf)
            torch.maximum(chunk_RW.amax(1), norm_R[inside], out=shift_R[inside])
            chunk_RW.sub_(shift_R[inside, None]).clamp_(min=LOWEST).exp_()
            mixed_RW = mixed_RW.tril_(-1) if strip.causal else mixed_RW.masked_fill_(unseen_RW, 0.0)
            torch.sum(chunk_RW, 1, out=sum_R[inside])
        return shift_R, sum_R

    def _same_token(self, rows: slice, width: int, left: int) -> tuple[Tensor, Tensor]:
        """Row of each pair, and its place in the flattened strip."""
        pairs = []
        for places, first_N, count_N, is_other in self.runs:
            row_P, place_P = places.pairs(first_N[rows], count_N[rows])
            pairs.append((row_P, place_P.add_(row_P, alpha=width).add_(0 if is_other else left)))
        if len(pairs) == 1:
            return pairs[0]
        row_P, flat_P = (torch.cat(parts) for parts in zip(*pairs))
        return row_P, flat_P


def sum_by_row(value_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Log of the sum of ``exp(value)`` over each row's pairs, (R,); -inf where a row has none."""
    top_R = value_P.new_full((num_rows,), -torch.inf).scatter_reduce_(0, row_P, value_P, "amax")
    share_P = (value_P - top_R.index_select(0, row_P)).exp_()
    return torch.zeros_like(top_R).scatter_add_(0, row_P, share_P).log_().add_(top_R)


def row_groups(num_pairs_N: Tensor, rows: slice) -> Iterator[slice]:
    """Cut rows so that their pairs do not take much memory, even where one token fills the text."""
    num_rows = rows.stop - rows.start
    parts = 1 + int(num_pairs_N[rows].sum()) // _MAX_PAIRS
    step = -(-num_rows // parts)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
