"""Every formula that turns scores of a memory into log-probabilities; classes elsewhere only hold state.

Shapes: N positions, M candidates, V vocabulary. All logarithms are natural. A position whose memory is empty gets minus
infinity and a zero gradient, never NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq.memory.log_space import log_add
from fairseq.memory.types import Candidates, LogSums

# exp(-80) is nothing beside 1 in any precision, but where the result underflows exp takes 50 times as long.
LOWEST = -80.0
FAR = math.exp(-50.0)  # beside this a million candidates at LOWEST do not show


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a positive number."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not positive; 1 leaves the scores as they are")


def check_weight(weight: float, name: str = "weight") -> None:
    """Raise ValueError unless ``weight`` is in [0, 1]; ``name`` is what the user knows it by."""
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"{name} {weight} is not in [0, 1]; 0 means the language model alone")


def masked_logsumexp(scores_NM: Tensor, keep_NM: Tensor) -> Tensor:
    """Log of the sum of ``exp(scores)`` where ``keep``, (N,); -inf with a zero gradient for a row without any."""
    share_NM, top_N = _shares(scores_NM, keep_NM)
    return _log_of_sum(share_NM.sum(1), top_N)


def _shares(scores_NM: Tensor, keep_NM: Tensor | None) -> tuple[Tensor, Tensor]:
    """``exp(score - top)`` and each row's largest score, -inf where it keeps none; what is not kept is nearly 0.

    All is kept where ``keep_NM`` is None.
    """
    if not scores_NM.shape[1]:
        return scores_NM, scores_NM.new_full(scores_NM.shape[:1], -torch.inf)
    if keep_NM is None:
        seen_NM, top_N = scores_NM, scores_NM.detach().amax(1)
    else:
        # masked_fill takes ten times as long: it is not vectorized, nor is the conversion of booleans.
        seen_NM = torch.minimum(scores_NM, _zero_or_one(keep_NM, scores_NM.dtype).sub_(0.5).mul_(torch.inf))
        top_N = seen_NM.detach().amax(1)
        if math.isnan(top_N.sum()):  # what is not kept may be nan
            seen_NM = scores_NM.masked_fill(~keep_NM, -torch.inf)
            top_N = seen_NM.detach().amax(1)
    shift_N1 = top_N.clamp(min=torch.finfo(top_N.dtype).min)[:, None]
    return torch.sub(seen_NM, shift_N1).clamp_(min=LOWEST).exp_(), top_N


def _zero_or_one(flag_NM: Tensor, dtype: torch.dtype) -> Tensor:
    return flag_NM.contiguous().view(torch.uint8).to(dtype)


def _log_of_sum(share_N: Tensor, top_N: Tensor) -> Tensor:
    """Log-sum from a sum of shares; -inf with a zero gradient where there is nothing."""
    if not share_N.requires_grad:
        return share_N.log_().add_(top_N)
    nothing_N = torch.isneginf(top_N) | (share_N == 0.0)
    return share_N.masked_fill(nothing_N, 1.0).log().add(top_N.masked_fill(nothing_N, -torch.inf))


def log_share(part: Tensor, whole: Tensor) -> Tensor:
    """``part - whole`` for log-sums, where nothing of nothing is -inf."""
    return part - whole.masked_fill(torch.isneginf(whole), 0.0)


def log_sums(found: Candidates, target_N: Tensor, temperature: float) -> LogSums:
    """Sums of exp(score / temperature) over the candidates: those that hold the target, and all; -inf where none does.

    Raises: ValueError if temperature <= 0.
    """
    check_temperature(temperature)
    scores_NM = found.scores_NM if temperature == 1.0 else found.scores_NM / temperature
    is_hit_NM = found.same_token(target_N, scores_NM.dtype)
    keep_NM = None if found.keeps_all() else found.keep_NM
    if keep_NM is not None:
        is_hit_NM *= _zero_or_one(keep_NM, scores_NM.dtype)
    share_NM, top_N = _shares(scores_NM, keep_NM)
    hit_share_N = (share_NM * is_hit_NM).sum(1)
    far_N = (hit_share_N > 0.0) & (hit_share_N < FAR)
    hit_N = _log_of_sum(hit_share_N, top_N)
    if far_N.any():  # next to the best candidate these are nothing, but on their own they are something
        hit_N = hit_N.masked_scatter(far_N, masked_logsumexp(scores_NM[far_N], is_hit_NM[far_N] > 0))
    return LogSums(hit_N, _log_of_sum(share_NM.sum(1), top_N))


def knn_logp(found: Candidates, target_N: Tensor, temperature: float) -> Tensor:
    """Log-probability that the candidates alone give to each target, (N,); -inf where none holds it.

    Args:
        found: candidates of N positions.
        target_N: int64 tokens.
        temperature: divides the scores.
    Raises: ValueError if temperature <= 0.
    Source: arXiv 1911.00172, sec. 2.

    ```python
    knn_logp(memory.lookup(query_ND), target_N, temperature=1.0)
    ```
    """
    sums = log_sums(found, target_N, temperature)
    return log_share(sums.hit_N, sums.whole_N)


def interpolate(lm_logp: Tensor, memory_logp: Tensor, weight: float) -> Tensor:
    """``log((1 - weight) p_lm + weight p_memory)``, elementwise; weight 0 returns ``lm_logp`` itself.

    Source: arXiv 1911.00172, eq. 3.  Raises: ValueError if weight is not in [0, 1].
    """
    check_weight(weight)
    if weight == 0.0:
        return lm_logp
    if weight == 1.0:
        return memory_logp
    return log_add(lm_logp + math.log1p(-weight), memory_logp + math.log(weight))


def joint_logp_of_sums(lm_logp: Tensor, lm_norm: Tensor, memory: LogSums) -> Tensor:
    """Log of the target's share when vocabulary and memory are normalised together, elementwise.

    Args:
        lm_logp: the language model's own log-probability of the target.
        lm_norm: the log-sum of the language model's scores (adaptive softmax: of its head).
        memory: the memory's sums, temperature applied.
    Source: arXiv 2205.12674, sec. 3. An empty memory gives ``lm_logp`` back, bit for bit.
    """
    excess = memory.whole_N - lm_norm
    return log_add(lm_logp, memory.hit_N - lm_norm) - log_add(excess, torch.zeros_like(excess))


def joint_logp(
    lm_logp_N: Tensor, lm_norm_N: Tensor, scores_NM: Tensor, keep_NM: Tensor, same_token_NM: Tensor
) -> Tensor:
    """:func:`joint_logp_of_sums` from the scores themselves, (N,).

    Args:
        scores_NM: the memory's scores, temperature applied.
        keep_NM: who may see whom.
        same_token_NM: whether the candidate's token is the target.
    """
    hit_N = masked_logsumexp(scores_NM, keep_NM & same_token_NM)
    return joint_logp_of_sums(lm_logp_N, lm_norm_N, LogSums(hit_N, masked_logsumexp(scores_NM, keep_NM)))


def joint_nll(
    lm_logp_N: Tensor, lm_norm_N: Tensor, scores_NM: Tensor, keep_NM: Tensor, same_token_NM: Tensor
) -> Tensor:
    """Minus :func:`joint_logp`: the loss TRIME trains with."""
    return -joint_logp(lm_logp_N, lm_norm_N, scores_NM, keep_NM, same_token_NM)


def vocab_logsumexp(found: Candidates, vocab_size: int, temperature: float) -> Tensor:
    """Log-sum of ``exp(score / temperature)`` over the candidates of each token, (N, V); -inf where there is none."""
    check_temperature(temperature)
    scores_NM = (found.scores_NM / temperature).masked_fill(~found.keep_NM, -torch.inf)
    # A masked candidate may carry any value (-1 for a missing row): send it to token 0, where it adds nothing.
    values_NM = found.values_NM.expand_as(scores_NM).masked_fill(~found.keep_NM, 0)
    empty_NV = scores_NM.new_full((scores_NM.shape[0], vocab_size), -torch.inf)
    # Each token's own maximum is taken out first: with the row's maximum a far token's share would underflow.
    best_NV = empty_NV.scatter_reduce(1, values_NM, scores_NM.detach(), "amax")
    best_NV = best_NV.masked_fill(torch.isneginf(best_NV), 0.0)
    share_NM = torch.exp(scores_NM - best_NV.gather(1, values_NM))
    return torch.log(torch.zeros_like(empty_NV).scatter_add(1, values_NM, share_NM)) + best_NV


def vocab_logp(found: Candidates, vocab_size: int, temperature: float) -> Tensor:
    """:func:`knn_logp` for every token at once, (N, V): what generation and beam search need."""
    sums_NV = vocab_logsumexp(found, vocab_size, temperature)
    return log_share(sums_NV, torch.logsumexp(sums_NV, dim=1, keepdim=True))


def joint_vocab_logp(lm_logp_NV: Tensor, lm_norm_N: Tensor, found: Candidates, temperature: float) -> Tensor:
    """:func:`joint_logp` for every token at once, (N, V)."""
    sums_NV = vocab_logsumexp(found, lm_logp_NV.shape[1], temperature)
    whole_N1 = torch.logsumexp(sums_NV, dim=1, keepdim=True)
    return joint_logp_of_sums(lm_logp_NV, lm_norm_N[:, None], LogSums(sums_NV, whole_N1))
