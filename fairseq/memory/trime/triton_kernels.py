# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, arg-type, import-not-found"
"""The part of TRIME's joint loss between the matrix products, as one Triton kernel; for CUDA.

A strip's similarities are read twice, once for the log-sums and once for the gradients, which are written in the keys'
own precision for the products that follow. With PyTorch's operations they would be read and written a dozen times.

Shapes: N positions, M memories from elsewhere, D key width; R rows and W columns of a strip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq.memory.trime.joint_loss import Computed, NeedsGrad, compute_eager
from fairseq.memory.trime.streaming import (
    Gradients,
    InBatchMemory,
    RunningSums,
    accumulate_strips,
    begin,
    can_widen,
    end,
)
from fairseq.memory.trime.visibility import Strip

_BLOCK = 1024


def compute_on_gpu(
    memory: InBatchMemory,
    needs_grad: NeedsGrad,
    key_ND: Tensor,
    lm_logp_N: Tensor,
    lm_norm_N: Tensor,
    other_key_MD: Tensor | None,
) -> Computed:
    """As ``joint_loss.compute_eager``. Half-precision keys are multiplied as they are and summed in float32."""
    if key_ND.dtype == torch.float64 or not len(key_ND):
        return compute_eager(memory, needs_grad, key_ND, lm_logp_N, lm_norm_N, other_key_MD)
    if not can_widen(key_ND):
        key_ND = key_ND.float()
    other_key_MD = None if other_key_MD is None else other_key_MD.to(key_ND.dtype)
    logp_N, norm_N = lm_logp_N.float().contiguous(), lm_norm_N.float().contiguous()
    gradients = Gradients(
        torch.zeros_like(key_ND, dtype=torch.float32) if needs_grad.key else None,
        torch.zeros_like(other_key_MD, dtype=torch.float32) if needs_grad.other and other_key_MD is not None else None,
    )
    sums = begin(memory, logp_N, norm_N)
    accumulate_strips(memory, key_ND, other_key_MD, TritonStripGradient(sums, key_ND.dtype), gradients)
    total, logp_grad_N, norm_grad_N = end(sums, logp_N)
    return total, [gradients.key_ND, logp_grad_N, norm_grad_N, gradients.other_MD]


class TritonStripGradient:
    """See ``streaming.StripGradient``. A row starts at the vocabulary's log-sum and keeps its largest exponent."""

    def __init__(self, sums: RunningSums, weight_dtype: torch.dtype) -> None:
        self.sums = sums
        self.weight_dtype = weight_dtype
        # One share in 100,000 memories is below float16's normal numbers, and the largest gradient is 1.
        self.gain = 4096.0 if weight_dtype == torch.float16 else 1.0
        self.token_N = sums.token_N.contiguous()
        self.other_token_M = self.token_N if sums.other_token_M is None else sums.other_token_M.contiguous()

    def __call__(self, score_RW: Tensor, strip: Strip, needs_weights: bool) -> tuple[Tensor, Tensor | None]:
        """See ``streaming.StripGradient``."""
        sums = self.sums
        in_place = not needs_weights or score_RW.dtype == self.weight_dtype
        weight_RW = score_RW if in_place else torch.empty_like(score_RW, dtype=self.weight_dtype)
        visible = sums.visible
        _weigh_row[(strip.num_rows,)](
            score_RW,
            weight_RW,
            score_RW.shape[1],
            self.token_N,
            self.other_token_M,
            sums.num_other,
            strip.start,
            strip.low,
            visible.first_N,
            visible.past_N,
            visible.later_N,
            sums.norm_N,
            sums.whole_N,
            sums.target_N,
            self.gain,
            WANTS_WEIGHTS=needs_weights,
            BLOCK=_BLOCK,
        )
        return weight_RW, None


# No annotations below: the compiler would look them up as values.


@triton.jit
def _see(score_row, column, width, token, other_token, num_other, low, first, past, later, wanted, norm):
    """Scores of some columns less the vocabulary's log-sum, whether the row sees them, whether they hold its target."""
    inside = column < width
    is_other = column < num_other
    m = column - num_other + low
    seen = inside & (is_other | ((m >= first) & (m < past)) | (m >= later))
    score = tl.load(score_row + column, mask=seen, other=0.0) - norm
    own = tl.load(token + m, mask=inside & (column >= num_other), other=-1)
    other = tl.load(other_token + column, mask=is_other, other=-1)
    hit = seen & (tl.where(is_other, other, own) == wanted)
    return score, seen, hit


@triton.jit
def _weigh_row(
    score,
    weight,
    width,
    token,
    other_token,
    num_other,
    start,
    low,
    first_N,
    past_N,
    later_N,
    norm_N,
    whole_N,
    target_N,
    gain,
    WANTS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a strip: update its sums, and turn its scores into gradients."""
    row = tl.program_id(0).to(tl.int64)
    n = start + row
    first, past, later = tl.load(first_N + n), tl.load(past_N + n), tl.load(later_N + n)
    wanted, norm = tl.load(token + n), tl.load(norm_N + n)
    score_row, weight_row = score + row * width, weight + row * width
    # What was seen before is a single exponent with share 1, so there is never a row without any.
    whole_top, target_top = tl.load(whole_N + n), tl.load(target_N + n)
    whole_sum, target_sum = whole_top * 0.0 + 1.0, whole_top * 0.0 + 1.0
    for left in range(0, width, BLOCK):
        column = left + tl.arange(0, BLOCK)
        s, seen, hit = _see(
            score_row, column, width, token, other_token, num_other, low, first, past, later, wanted, norm
        )
        top = tl.maximum(whole_top, tl.max(tl.where(seen, s, float("-inf")), 0))
        whole_sum = whole_sum * tl.exp(whole_top - top) + tl.sum(tl.where(seen, tl.exp(s - top), 0.0), 0)
        whole_top = top
        top = tl.maximum(target_top, tl.max(tl.where(hit, s, float("-inf")), 0))
        target_sum = target_sum * tl.exp(target_top - top) + tl.sum(tl.where(hit, tl.exp(s - top), 0.0), 0)
        target_top = top
    whole, target = whole_top + tl.log(whole_sum), target_top + tl.log(target_sum)
    tl.store(whole_N + n, whole)
    tl.store(target_N + n, target)
    if WANTS_WEIGHTS:
        for left in range(0, width, BLOCK):
            column = left + tl.arange(0, BLOCK)
            s, seen, hit = _see(
                score_row, column, width, token, other_token, num_other, low, first, past, later, wanted, norm
            )
            gradient = tl.where(seen, tl.exp(s - whole), 0.0) - tl.where(hit, tl.exp(s - target), 0.0)
            tl.store(weight_row + column, (gradient * gain).to(weight.dtype.element_ty), mask=column < width)
