"""One scored position as a combiner saw it, and the distribution that the combiner makes of it.

Shapes: V vocabulary, C tokens of a chunk, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq.memory.combiners.base import Combiner
from fairseq.memory.scoring import vocab_logsumexp
from fairseq.memory.types import Candidates, LogSums

_NUMBERS = 1 << 22  # tokens times candidates that are combined at a time


@dataclass(frozen=True)
class SeenPosition:
    """What a combiner is given at one position, for every token of the vocabulary."""

    lm_logp_V: Tensor
    """ln p of every token by the language model, float32 (float64 in :meth:`wide`)."""
    norm: Tensor
    """Log-sum of its vocabulary scores, a number."""
    candidates: Candidates | None = None
    """One row: what the external memory offered."""
    text: Sequence[Candidates] = ()
    """One row each: what the memories of the text offered."""
    text_temperature: float = 1.0
    """Divides the similarities of the memories of the text."""

    def logp(self, combine: Combiner | None, token_N: Tensor) -> Tensor:
        """ln p of some tokens, through a combiner; by the language model alone if it is None. (N,)."""
        if combine is None:
            return self.lm_logp_V[token_N]
        sums = self._text_sums()
        width = 1 if self.candidates is None else max(1, self.candidates.scores_NM.shape[1])
        parts = []
        for token_C in torch.split(token_N, max(1, _NUMBERS // width)):
            text_sums = None if sums is None else LogSums(sums.hit_N[token_C], sums.whole_N.expand(len(token_C)))
            norm_C = self.norm.expand(len(token_C))
            parts.append(combine(self.lm_logp_V[token_C], norm_C, self._rows(len(token_C)), token_C, text_sums))
        return torch.cat(parts).to(self.lm_logp_V.dtype) if parts else self.lm_logp_V.new_empty(0)

    def mass(self, combine: Combiner | None) -> float:
        """The probabilities of all tokens, summed in float64; 1 for a distribution."""
        every_V = torch.arange(len(self.lm_logp_V), device=self.lm_logp_V.device)
        return float(self.logp(combine, every_V).double().exp().sum())

    def wide(self) -> SeenPosition:
        """The same numbers in float64, so that nothing rounds on the way from the scores to the probabilities."""
        return SeenPosition(
            self.lm_logp_V.double(),
            self.norm.double(),
            None if self.candidates is None else _wide(self.candidates),
            [_wide(found) for found in self.text],
            self.text_temperature,
        )

    def _rows(self, count: int) -> Candidates | None:
        """The external memory's candidates, for as many targets."""
        row = self.candidates
        if row is None:
            return None
        facts = row.facts
        if facts is not None:
            at_C = torch.zeros(count, dtype=torch.int64, device=row.scores_NM.device)
            facts = facts.rows(at_C)
        rows_NM = None if row.rows_NM is None else row.rows_NM.expand(count, -1)
        return Candidates(
            row.values_NM[:1],
            row.scores_NM.expand(count, -1),
            row.keep_NM.expand(count, -1).contiguous(),
            rows_NM,
            facts,
        )

    def _text_sums(self) -> LogSums | None:
        """Sums over the memories of the text for every token: ``hit_N`` is of each token, ``whole_N`` is one number."""
        total: Tensor | None = None
        for found in self.text:
            sums_V = vocab_logsumexp(found, len(self.lm_logp_V), self.text_temperature)[0]
            total = sums_V if total is None else torch.logaddexp(total, sums_V)
        return None if total is None else LogSums(total, torch.logsumexp(total, 0, keepdim=True))


def _wide(found: Candidates) -> Candidates:
    return replace(found, scores_NM=found.scores_NM.double())
