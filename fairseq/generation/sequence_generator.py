"""Beam search over a batch of sentences, with the rules and scores of fairseq's.

Shapes: S live sentences, K rows of each (one until the first token is chosen), R = S * K, T tokens, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq.generation.beam_search import (
    Continuations,
    best_continuations,
    drawn_continuations,
    forbid_repeated_ngrams_,
)
from fairseq.generation.config import GenerationConfig
from fairseq.generation.next_token import GenerationMemory, NextToken
from fairseq.generation.steps.products import StepProducts
from fairseq.modules.inference_linear import multiplying_by

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.transformer_lm import TransformerLanguageModel


@dataclass(frozen=True)
class Hypothesis:
    """One generated text."""

    tokens: Tensor
    """int64 (T,), a given beginning and </s> included."""
    logp: Tensor
    """Log-probability of each token, (T,) float32."""
    score: float
    """Their sum over the length to the power of --lenpen."""


@dataclass(frozen=True)
class _Beams:
    """Texts that are not ended."""

    sentence_S: Tensor
    """int64 number of each live sentence in the batch."""
    tokens_RT: Tensor
    logp_RT: Tensor
    total_SK: Tensor
    """Sum of ``logp_RT``."""
    limit_S: Tensor
    """int64 tokens after which </s> must follow."""

    @property
    def num_tokens(self) -> int:
        return self.tokens_RT.shape[1]


class SequenceGenerator:
    """Generates the continuation, or the translation, of every sentence of a batch."""

    def __init__(
        self,
        models: Sequence[TransformerLanguageModel],
        dictionary: Dictionary,
        config: GenerationConfig,
        memory: GenerationMemory | None = None,
    ) -> None:
        """Args.

        models: in evaluation mode; the probabilities of several are averaged.
        dictionary: of the text that is generated.
        memory: mixed into each step; of one model only.
        Raises: ValueError for more beams than the dictionary has types, or a memory of several models.
        """
        if config.beam + 2 > len(dictionary):
            raise ValueError(f"--beam {config.beam} is too large for a dictionary of {len(dictionary)} types")
        if memory is not None and len(models) > 1:
            raise ValueError(f"a datastore is of one model, --path names {len(models)}; give that one")
        self.models, self.config, self.memory = list(models), config, memory
        self.eos, self.pad, self.unk = dictionary.eos(), dictionary.pad(), dictionary.unk()
        self._products = StepProducts()
        self.watch: Callable[[Tensor], None] | None = None
        """Is given each step's log-probabilities, (R, V), which it must not change."""

    @torch.inference_mode()
    def generate(
        self,
        source: Mapping[str, Any],
        source_lengths: Sequence[int],
        prefix_BT: Tensor | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Hypothesis]]:
        """The --nbest hypotheses of each sentence, the best first.

        A source without words has one hypothesis, that is empty.

        Args:
            source: what the models read besides their own text (``batch.source``), B rows; empty for a language model.
            source_lengths: tokens of each source, </s> included; of a language model's prefix.
            prefix_BT: int64 beginnings that the texts are given, without </s> or padding.
            limits: tokens before </s> that each text may have, instead of those of the config.
        Raises: ValueError for a beginning that is longer than its text may be, or scores that are not finite.
        """
        self._products.begin()
        with multiplying_by(self._products):
            return self._generate(source, torch.tensor(list(source_lengths)), prefix_BT, limits)

    def _generate(
        self,
        source: Mapping[str, Any],
        lengths_B: Tensor,
        prefix_BT: Tensor | None,
        limits: Sequence[int] | None,
    ) -> list[list[Hypothesis]]:
        config = self.config
        count, device = len(lengths_B), self._device()
        if prefix_BT is None:
            prefix_BT = torch.empty(count, 0, dtype=torch.int64)
        prefix_BT = prefix_BT.to(device)
        found: list[list[Hypothesis]] = [[] for _ in range(count)]
        steps = NextToken(
            self.models, source, temperature=config.logit_temperature, memory=self.memory, num_sentences=count
        )
        empty_B = (lengths_B < 2) & bool(source)
        for number in empty_B.nonzero()[:, 0].tolist():
            found[number] = [Hypothesis(torch.tensor([self.eos], device=device), torch.zeros(1, device=device), 0.0)]
        limit_B = self._limits(lengths_B) if limits is None else torch.tensor(list(limits))
        beams = self._begin(steps, prefix_BT, limit_B.to(device))
        last_RT = torch.cat([torch.full((count, 1), self.eos, device=device), prefix_BT], 1)[:, -1:]
        if bool(empty_B.any()):
            beams, stay = self._without(beams, empty_B.to(device))
            steps.reorder(stay, stay)
            last_RT = last_RT[stay]
        while len(beams.sentence_S):
            logp_RV = steps.logp(last_RT)
            if self.watch is not None:
                self.watch(logp_RV)
            logp_RV = self._permitted(logp_RV, beams)
            chosen = self._choose(logp_RV, beams)
            beams, rows, sentences = self._advance(beams, chosen, logp_RV, found)
            if len(beams.sentence_S):
                steps.reorder(rows, sentences)
                last_RT = beams.tokens_RT[:, -1:]
        if not all(found):
            raise ValueError(
                f"{sum(not hypotheses for hypotheses in found)} of {count} sentences have no text with a finite score: "
                "the model's scores overflow; run it without --fp16, or check the checkpoint"
            )
        return [sorted(hypotheses, key=lambda h: -h.score)[: config.nbest] for hypotheses in found]

    def _device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def _limits(self, lengths_B: Tensor) -> Tensor:
        """Tokens before </s> that each text may have."""
        config = self.config
        longest = min(model.max_positions for model in self.models) - 1
        if config.match_source_len:
            return (lengths_B - 1).clamp(max=longest)
        # In Python's floats, as fairseq counts: in those of a tensor a large limit overflows.
        limits = (int(min(config.max_len_a * length + config.max_len_b, longest)) for length in lengths_B.tolist())
        return torch.tensor(list(limits), dtype=torch.int64)

    def _begin(self, steps: NextToken, prefix_BT: Tensor, limit_B: Tensor) -> _Beams:
        """One row for each sentence: the beginning it was given."""
        count, length = prefix_BT.shape
        if length > int(limit_B.min()) if count else False:
            raise ValueError(
                f"texts begin with {length} tokens, but may have {int(limit_B.min())}; raise --max-len-b (at most the "
                "model's --max-target-positions)"
            )
        inputs_BT = torch.cat([torch.full_like(limit_B, self.eos)[:, None], prefix_BT], 1)[:, :-1]
        logp_BT = steps.prefix_logp(inputs_BT, prefix_BT)
        sentences = torch.arange(count, device=prefix_BT.device)
        return _Beams(sentences, prefix_BT, logp_BT, logp_BT.sum(1, keepdim=True), limit_B)

    def _without(self, beams: _Beams, gone_S: Tensor) -> tuple[_Beams, Tensor]:
        """Beams of one row each without some sentences; also the sentences that remain."""
        stay = (~gone_S).nonzero()[:, 0]
        left = _Beams(
            beams.sentence_S[stay],
            beams.tokens_RT[stay],
            beams.logp_RT[stay],
            beams.total_SK[stay],
            beams.limit_S[stay],
        )
        return left, stay

    def _permitted(self, logp_RV: Tensor, beams: _Beams) -> Tensor:
        """The same with what no text may hold next at -inf, in place."""
        config, done = self.config, beams.num_tokens
        logp_RV[:, self.pad] = -torch.inf
        logp_RV[:, self.unk] -= config.unkpen
        shortest = beams.limit_S if config.match_source_len else torch.full_like(beams.limit_S, config.min_len)
        rows = len(logp_RV) // len(beams.sentence_S)
        early_R = (done < torch.minimum(shortest, beams.limit_S)).repeat_interleave(rows)
        logp_RV[:, self.eos].masked_fill_(early_R, -torch.inf)
        if config.no_repeat_ngram_size:
            forbid_repeated_ngrams_(logp_RV, beams.tokens_RT, config.no_repeat_ngram_size)
        over_R = (done >= beams.limit_S).repeat_interleave(rows)
        if bool(over_R.any()):
            eos_R = logp_RV[over_R, self.eos]
            logp_RV[over_R] = -torch.inf
            logp_RV[over_R, self.eos] = eos_R
        return logp_RV

    def _choose(self, logp_RV: Tensor, beams: _Beams) -> Continuations:
        config = self.config
        if not config.sampling:
            return best_continuations(logp_RV, beams.total_SK, 2 * config.beam)
        rows = beams.total_SK.shape[1]
        total_SK = beams.total_SK
        if rows < config.beam:  # the first draw
            logp_RV = logp_RV.repeat_interleave(config.beam, 0)
            total_SK = total_SK.expand(-1, config.beam)
        chosen = drawn_continuations(logp_RV, total_SK, config.sampling_topk, config.sampling_topp)
        return Continuations(chosen.row_SC % rows, chosen.token_SC, chosen.total_SC)

    def _advance(
        self, beams: _Beams, chosen: Continuations, logp_RV: Tensor, found: list[list[Hypothesis]]
    ) -> tuple[_Beams, Tensor, Tensor | None]:
        """Store the texts that end, and go on with the others.

        Returns: the beams, the rows they continue, and the sentences that remain (None for all).
        """
        count, width = beams.total_SK.shape
        beam = self.config.beam
        row_SC = chosen.row_SC + width * torch.arange(count, device=chosen.row_SC.device)[:, None]
        ends_SC = (chosen.token_SC == self.eos) & torch.isfinite(chosen.total_SC)
        self._store(beams, chosen, row_SC, ends_SC[:, :beam], logp_RV, found)
        full = [len(found[number]) >= beam for number in beams.sentence_S.tolist()]
        ended_S = torch.tensor(full, device=row_SC.device) | (beams.num_tokens >= beams.limit_S)
        # Those that go on come first, in their order; a drawn row that ended stays, with probability 0.
        place_SC = torch.arange(ends_SC.shape[1], device=row_SC.device) + ends_SC * ends_SC.shape[1]
        kept_SK = place_SC.argsort(1)[:, :beam]
        stay = (~ended_S).nonzero()[:, 0]
        kept_SK = kept_SK[stay]
        total_SK = chosen.total_SC[stay].masked_fill(ends_SC[stay], -torch.inf).gather(1, kept_SK)
        rows_R = row_SC[stay].gather(1, kept_SK).flatten()
        token_R = chosen.token_SC[stay].gather(1, kept_SK).flatten()
        left = _Beams(
            beams.sentence_S[stay],
            torch.cat([beams.tokens_RT[rows_R], token_R[:, None]], 1),
            torch.cat([beams.logp_RT[rows_R], logp_RV[rows_R, token_R][:, None]], 1),
            total_SK,
            beams.limit_S[stay],
        )
        return left, rows_R, stay if len(stay) < count else None

    def _store(
        self,
        beams: _Beams,
        chosen: Continuations,
        row_SC: Tensor,
        ends_SK: Tensor,
        logp_RV: Tensor,
        found: list[list[Hypothesis]],
    ) -> None:
        """Keep the texts that end, up to --beam for each sentence."""
        sentence_E, place_E = ends_SK.nonzero(as_tuple=True)
        if not len(sentence_E):
            return
        row_E = row_SC[sentence_E, place_E]
        end_E1 = torch.full((len(row_E), 1), self.eos, device=row_E.device)
        tokens_ET = torch.cat([beams.tokens_RT[row_E], end_E1], 1)
        logp_ET = torch.cat([beams.logp_RT[row_E], logp_RV[row_E, self.eos][:, None]], 1)
        score_E = chosen.total_SC[sentence_E, place_E]
        if not self.config.unnormalized:
            score_E = score_E / tokens_ET.shape[1] ** self.config.lenpen
        numbers = beams.sentence_S[sentence_E].tolist()
        for number, tokens, logp, score in zip(numbers, tokens_ET, logp_ET, score_E.tolist()):
            if len(found[number]) < self.config.beam:
                found[number].append(Hypothesis(tokens, logp, score))
