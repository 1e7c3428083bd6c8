"""The distribution of the next token, by one model or several, with a memory mixed in.

Shapes: R live rows, S sentences, T tokens read in one step, D width, V types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fairseq.generation.steps.beam_cache import BeamCache
from fairseq.modules.multihead_attention import Encoded, IncrementalState

if TYPE_CHECKING:
    from fairseq.memory.combiners.facts import FactReader
    from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.types import Candidates
    from fairseq.models.outputs import LMOutput
    from fairseq.models.transformer_lm import TransformerLanguageModel

_ROWS_AT_ONCE = 1024
"""Positions of a given beginning whose vocabulary scores are held at once."""


class StepMemory(Protocol):
    """A memory that changes the distribution of the next token."""

    @property
    def key_tap(self) -> str:
        """Inner state of the model that is the query."""

    def mix_(self, scores_RV: Tensor, query_RD: Tensor, sentence_R: Tensor) -> None:
        """Turn the model's scores into log-probabilities of model and memory together, in place.

        Args:
            sentence_R: int64 number of each row's sentence in the batch, on the host.
        """
        ...


class GenerationMemory(Protocol):
    """A memory of a whole run."""

    @property
    def key_tap(self) -> str:
        """Inner state of the model that is the key."""

    def begin(self, source: Mapping[str, Any]) -> StepMemory:
        """The memory of a batch, given what its models read (``batch.source``)."""
        ...


class NeighborMemory:
    """The nearest rows of a datastore, mixed into the vocabulary (arXiv 2010.00710)."""

    def __init__(
        self, memory: ExternalMemory, mixer: VocabularyMixer, key_tap: str, facts: FactReader | None = None
    ) -> None:
        """Args.

        facts: adds to the candidates what the mixer's weighting reads besides.
        """
        self.memory, self.mixer, self.key_tap, self.facts = memory, mixer, key_tap, facts

    def begin(self, source: Mapping[str, Any]) -> NeighborMemory:
        """The same for every batch."""
        return self

    def mix_(self, scores_RV: Tensor, query_RD: Tensor, sentence_R: Tensor) -> None:
        """See ``StepMemory``: one search for all rows."""
        if self.mixer.is_off:
            self.mixer.normalize_(scores_RV)
            return
        self.mixer.mix_(scores_RV, None, self.find(query_RD))

    def find(self, query_RD: Tensor) -> Candidates:
        """The nearest rows of each query, on its device, with what the weighting reads besides."""
        found = self.memory.candidates(self.memory.neighbors(query_RD), query_RD.device)
        return found if self.facts is None else self.facts(found, query_RD)


class NextToken:
    """Models that read a batch of texts step by step; each sentence may have several rows, one after the other."""

    def __init__(
        self,
        models: Sequence[TransformerLanguageModel],
        source: Mapping[str, Any],
        *,
        temperature: float = 1.0,
        memory: GenerationMemory | None = None,
        num_sentences: int | None = None,
    ) -> None:
        """Args.

        source: what the models read besides their own text (``batch.source``); read once.
        temperature: divides the scores of every model.
        memory: of the one model there is.
        num_sentences: sentences of the batch; by default those of the source.
        """
        assert memory is None or len(models) == 1, "keys come from one model"
        self.models = list(models)
        self.temperature = temperature
        self.memory = None if memory is None else memory.begin(source)
        count = num_sentences if num_sentences is not None else len(source.get("source_BS", ()))
        self._sentence_S = torch.arange(count)
        self._states = [_cache_for(model) for model in models]
        self._encoded: list[Encoded | None] = [
            model.encode(source["source_BS"]) if "source_BS" in source else None  # type: ignore[operator]
            for model in models
        ]

    def logp(self, tokens_RT: Tensor) -> Tensor:
        """Read tokens after those of earlier calls; log-probability of every type after the last, (R, V) float32.

        The result may be written to.
        """
        parts = [self._logp(number, tokens_RT) for number in range(len(self.models))]
        return mean_logp(parts)

    def prefix_logp(self, tokens_RT: Tensor, target_RT: Tensor) -> Tensor:
        """Read tokens as :meth:`logp` does; log-probability of the target of each, (R, T)."""
        shape, steps = tokens_RT.shape, []
        if self.memory is None and self.temperature == 1.0 and target_RT.numel():
            return mean_logp([self._read(number, tokens_RT, target_RT) for number in range(len(self.models))])
        for step in range(shape[1]):  # a memory may need every step's whole distribution
            steps.append(self.logp(tokens_RT[:, step : step + 1]).gather(1, target_RT[:, step, None]))
        return torch.cat(steps, 1) if steps else torch.empty(shape, device=tokens_RT.device)

    def _read(self, number: int, tokens_RT: Tensor, target_RT: Tensor) -> Tensor:
        """A model's log-probability of each target, (R, T), of all positions at once."""
        hidden_ND = self._states_after(number, tokens_RT).hidden_BTD.flatten(0, 1)
        return self.models[number].target_logp(hidden_ND, target_RT.flatten(), _ROWS_AT_ONCE)[0].view_as(target_RT)

    def _states_after(self, number: int, tokens_RT: Tensor) -> LMOutput:
        encoded = self._encoded[number]
        tap = None if self.memory is None else self.memory.key_tap
        given = {} if encoded is None else {"encoded": encoded}
        out: LMOutput = self.models[number](tokens_RT, tap, self._states[number], **given)
        return out

    def _logp(self, number: int, tokens_RT: Tensor) -> Tensor:
        model, out = self.models[number], self._states_after(number, tokens_RT)
        hidden_RD = out.hidden_BTD[:, -1]
        if self.memory is None and self.temperature == 1.0:
            return model.vocab_logp(hidden_RD)
        scores_RV = model.vocab_scores(hidden_RD)
        if self.temperature != 1.0:
            scores_RV = scores_RV / self.temperature
        if self.memory is None:
            return torch.log_softmax(scores_RV, 1)
        assert out.key_BTD is not None, "a key was asked for"
        live = max(len(self._sentence_S), 1)
        sentence_R = self._sentence_S.repeat_interleave(len(scores_RV) // live)
        self.memory.mix_(scores_RV, out.key_BTD[:, -1], sentence_R)
        return scores_RV

    def reorder(self, rows_R: Tensor, sentences: Tensor | None = None) -> None:
        """Go on with these rows; ``sentences`` are the numbers of the sentences that remain, when some do not."""
        if sentences is not None:
            self._sentence_S = self._sentence_S[sentences.cpu()]
        for number, state in enumerate(self._states):
            state.reorder(rows_R, sentences)
            encoded = self._encoded[number]
            if encoded is not None and sentences is not None:
                self._encoded[number] = encoded.rows(sentences)


def _cache_for(model: TransformerLanguageModel) -> IncrementalState:
    """The cache that is faster for a model's device and precision."""
    weight = next(model.parameters())
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_grad_enabled()
    return BeamCache() if fits else IncrementalState()


def mean_logp(parts: Sequence[Tensor]) -> Tensor:
    """Log of the mean of several models' probabilities, elementwise."""
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(list(parts)), 0) - math.log(len(parts))
