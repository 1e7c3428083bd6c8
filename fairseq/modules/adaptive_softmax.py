"""A softmax that is cheap for large vocabularies (arXiv 1609.04309).

Frequent types are in the head; each tail of rarer types is one more entry of the head, with a narrower softmax of its
own. Shapes: N positions, D width, V types, C entries of the head (frequent types, then one per tail).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.modules import blocked_softmax
from fairseq.modules.adaptive_input import AdaptiveInput, band_width, bands_of


class SharedLinear(nn.Module):
    """A linear map whose matrix is another module's parameter."""

    def __init__(self, weight: Tensor, transpose: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transpose = transpose

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply the map."""
        return F.linear(x_ND, self.weight.t() if self.transpose else self.weight)


class SharedHead(nn.Module):
    """The head's scores when its types share the first band of an adaptive input; tails have rows of their own."""

    def __init__(self, weight: Tensor, num_tails: int) -> None:
        super().__init__()
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's files have one; it means nothing
        self.word_proj = SharedLinear(weight)
        self.class_proj = nn.Linear(weight.shape[1], num_tails, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Scores of the head's entries, (N, C)."""
        return torch.cat([self.word_proj(x_ND), self.class_proj(x_ND)], dim=1)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of targets, or of all types, under an adaptive softmax."""

    def __init__(
        self,
        dictionary_size: int,
        width: int,
        cutoff: Sequence[int],
        *,
        factor: float = 4.0,
        dropout: float = 0.0,
        adaptive_input: AdaptiveInput | None = None,
        tie_proj: bool = False,
    ) -> None:
        """Args.

        adaptive_input: share its bands of embeddings; it has the same cutoffs.
        tie_proj: share its projections too.
        """
        super().__init__()
        self.ends = bands_of(cutoff, dictionary_size, "--adaptive-softmax-cutoff")
        self.dropout = dropout
        self.register_buffer("version", torch.ones(1, dtype=torch.long))
        num_tails = len(self.ends) - 1
        self.head: nn.Module
        if adaptive_input is None:
            self.head = nn.Linear(width, self.ends[0] + num_tails, bias=False)
        else:
            self.head = SharedHead(adaptive_input.bands()[0][0].weight, num_tails)
        self.tail = nn.ModuleList()
        for band in range(1, len(self.ends)):
            inner = band_width(width, factor, band, "--adaptive-softmax-factor")
            shared = adaptive_input.bands()[band] if adaptive_input is not None else None
            project: nn.Module = nn.Linear(width, inner, bias=False)
            if shared is not None and tie_proj:
                project = SharedLinear(shared[1].weight, transpose=True)
            output: nn.Module = nn.Linear(inner, self.ends[band] - self.ends[band - 1], bias=False)
            if shared is not None:
                output = SharedLinear(shared[0].weight)
            self.tail.append(nn.Sequential(project, nn.Dropout(dropout), output))

    def reset_parameters(self) -> None:
        """Draw the initial weights of what is not shared."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def target_logp(self, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and log-sum of the head's scores; both (N,) in float32.

        A tail's softmax is computed for the targets it holds and no others.
        """
        x_ND = F.dropout(x_ND, self.dropout, self.training)
        band_N = torch.zeros_like(target_N)
        for end in self.ends[:-1]:
            band_N += target_N >= end
        entry_N = torch.where(band_N == 0, target_N, self.ends[0] + band_N - 1)
        weight_CD = self._head_weight()
        if weight_CD is not None and blocked_softmax.fits(x_ND, weight_CD):
            logp_N, norm_N = blocked_softmax.target_logp(x_ND, weight_CD, entry_N)
        else:
            logp_N, norm_N = pick(self.head(x_ND), entry_N)
        for band, tail in enumerate(self.tail, start=1):
            # A tail without targets takes part too: its gradient is zero, not absent, whatever the batch holds.
            here = (band_N == band).nonzero().squeeze(1)
            within, _ = pick(tail(x_ND[here]), target_N[here] - self.ends[band - 1])
            logp_N = logp_N.index_add(0, here, within)
        return logp_N, norm_N

    def _head_weight(self) -> Tensor | None:
        """Matrix of the head, (C, D); None where a layer that took its place may compute anything."""
        head = self.head
        if type(head) is nn.Linear:
            return head.weight
        if type(head) is SharedHead and type(head.class_proj) is nn.Linear:
            return torch.cat([head.word_proj.weight, head.class_proj.weight])
        return None

    def vocab_logp(self, x_ND: Tensor) -> Tensor:
        """Log-probability of every type, (N, V) in float32."""
        return self._vocab(x_ND)[0]

    def vocab_scores(self, x_ND: Tensor) -> Tensor:
        """Scores of every type whose log-sum is that of the head's scores, (N, V) in float32."""
        logp_NV, norm_N1 = self._vocab(x_ND)
        return logp_NV + norm_N1

    def _vocab(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every type, and log-sum of the head's scores, (N, 1)."""
        x_ND = F.dropout(x_ND, self.dropout, self.training)
        score_NC = self.head(x_ND)
        head_NC = log_softmax(score_NC)
        parts = [head_NC[:, : self.ends[0]]]
        for band, tail in enumerate(self.tail):
            own_N1 = head_NC[:, self.ends[0] + band, None]
            parts.append(own_N1 + log_softmax(tail(x_ND)))
        return torch.cat(parts, dim=1), score_NC[:, :1].to(head_NC.dtype) - head_NC[:, :1]


def pick(score_NV: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of one entry per row, and the log-sum of each row; (N,), in float32 or wider.

    The log-sum is the entry's score less its log-softmax: one fused kernel instead of two.
    """
    logp_N = log_softmax(score_NV).gather(1, index_N[:, None]).squeeze(1)
    return logp_N, score_NV.gather(1, index_N[:, None]).squeeze(1).to(logp_N.dtype) - logp_N


def log_softmax(score_NV: Tensor) -> Tensor:
    """Log-softmax of each row, in float32 even when the scores are in half precision."""
    return F.log_softmax(score_NV, dim=1, dtype=torch.promote_types(score_NV.dtype, torch.float32))
