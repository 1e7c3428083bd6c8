"""A batch of text becomes log-probabilities and memory keys of the positions it scores.

Shapes: B blocks, T positions of a padded block, D width, N scored positions of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.scoring import interpolate
from fairseq.memory.sources.log_sums import log_sums
from fairseq.memory.types import LogSums, Passage, ScoredPositions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fairseq.data.types import LMBatch
    from fairseq.memory.sources.base import TextSource
    from fairseq.memory.types import Candidates
    from fairseq.models.base import LanguageModel
    from fairseq.models.transformer_lm import TransformerLanguageModel

    TargetScore = Callable[[LanguageModel, Tensor, Tensor, Tensor], Tensor]


class MixedDecoder(NamedTuple):
    """A decoder whose distribution is mixed into that of the language model (Memory Decoder, arXiv 2508.09874)."""

    model: TransformerLanguageModel
    weight: float
    """Its share, 0 to 1."""


@dataclass(frozen=True)
class Inspection:
    """What the scores of a batch of one block were made of; :meth:`SequenceScorer.score` fills it."""

    hidden: list[tuple[LanguageModel, Tensor]] = field(default_factory=list)
    """Each model, and its states at the scored positions, (N, D); a decoder that is mixed in comes last."""
    found: list[Candidates] = field(default_factory=list)
    """What each memory of the text offered to the scored positions."""


@dataclass(frozen=True)
class TextMemory:
    """Memories of the text that is being scored; batches must then come in its order."""

    sources: Sequence[TextSource]
    temperature: float
    """Divides their similarities."""
    record: Callable[[Passage, list[LogSums]], None] | None = None
    """Is given each passage and the sums of each source."""

    def sums(self, passage: Passage, seen: Inspection | None = None) -> LogSums:
        """Sums that the memories add to the passage's scored positions; then the passage is appended."""
        total: LogSums | None = None
        found: list[LogSums] = []
        for source in self.sources:
            candidates = source.lookup(passage)
            if seen is not None:
                seen.found.append(candidates)
            if self.record is not None:
                found.append(log_sums(candidates, passage.targets, self.temperature))
            total = log_sums(candidates, passage.targets, self.temperature, total)
        if self.record is not None:
            self.record(passage, found)
        for source in self.sources:
            source.append(passage)
        assert total is not None, "no memory of the text was given"
        return total


class SequenceScorer:
    """Runs a language model (or several, whose probabilities are averaged) over batches."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        key_tap: str | None = None,
        softmax_batch: int | None = None,
        device: torch.device | str = "cpu",
        text_memory: TextMemory | None = None,
        correct: TargetScore | None = None,
        decoder: MixedDecoder | None = None,
    ) -> None:
        """Args.

        models: language models in evaluation mode, on ``device``.
        key_tap: which inner state is the key; None when no keys are wanted.
        softmax_batch: positions whose vocabulary scores are held at once.
        text_memory: memories of the text itself; they read the keys.
        correct: replaces log-probabilities given (model, hidden_ND, target_N, logp_N); None keeps them.
        decoder: mixed into the models' mean; keys and the vocabulary's log-sum are the first model's all the same.
        Raises: ValueError when keys are wanted of several models.
        """
        if key_tap is not None and len(models) > 1:
            raise ValueError(f"keys come from one model, --path names {len(models)}")
        self.models = list(models)
        self.key_tap = key_tap
        self.softmax_batch = softmax_batch
        self.text_memory = text_memory
        self._correct = correct
        self.decoder = decoder
        self.device = torch.device(device)

    @property
    def corrects(self) -> bool:
        """True if log-probabilities of the model are replaced."""
        return self._correct is not None

    @torch.inference_mode()
    def score(self, batch: LMBatch, seen: Inspection | None = None) -> ScoredPositions:
        """Log-probability of every scored target, and its key if one is wanted.

        Args:
            seen: takes what the scores are made of, for a batch of one block.
        """
        here, place_N = batch.to(self.device), self.places(batch)
        target_N = here.target_BT.view(-1)[place_N]
        parts = []
        key_BTD = None
        for model in self.models:
            out = model(here.tokens_BT, key_tap=self.key_tap, **here.source)
            hidden_ND, key_BTD = out.hidden_BTD.flatten(0, 1)[place_N], out.key_BTD
            logp_N, norm_N = model.target_logp(hidden_ND, target_N, self.softmax_batch)
            if self._correct is not None:
                logp_N = self._correct(model, hidden_ND, target_N, logp_N)
            parts.append((logp_N, norm_N))
            if seen is not None:
                seen.hidden.append((model, hidden_ND))
        logp_N = _mean_probability([logp for logp, _ in parts])
        if self.decoder is not None:
            hidden_ND = self.decoder.model(here.tokens_BT).hidden_BTD.flatten(0, 1)[place_N]
            own_N = self.decoder.model.target_logp(hidden_ND, target_N, self.softmax_batch)[0]
            logp_N = interpolate(logp_N, own_N.float(), self.decoder.weight)
            if seen is not None:
                seen.hidden.append((self.decoder.model, hidden_ND))
        key_ND = key_BTD.flatten(0, 1)[place_N] if key_BTD is not None else None
        text_sums = self._text_sums(batch, here, key_BTD, seen) if self.text_memory is not None else None
        return ScoredPositions(_block_of(batch, place_N), target_N, logp_N, parts[0][1].float(), key_ND, text_sums)

    @torch.inference_mode()
    def vocab_logp(self, seen: Inspection, n: int) -> Tensor:
        """Log-probability of every type at the scored position ``n``, as :meth:`score` has it for the target, (V,)."""
        parts: list[Tensor] = []
        for model, hidden_ND in seen.hidden:
            logp_V = model.vocab_logp(hidden_ND[n : n + 1])[0].float()
            if self._correct is not None and len(parts) < len(self.models):
                every_V = torch.arange(len(logp_V), device=logp_V.device)
                logp_V = self._correct(model, hidden_ND[n].expand(len(logp_V), -1), every_V, logp_V)
            parts.append(logp_V)
        logp_V = _mean_probability(parts[: len(self.models)])
        return logp_V if self.decoder is None else interpolate(logp_V, parts[-1], self.decoder.weight)

    def _text_sums(self, batch: LMBatch, here: LMBatch, key_BTD: Tensor | None, seen: Inspection | None) -> LogSums:
        """Sums that the memories of the text add, block after block."""
        assert self.text_memory is not None
        assert key_BTD is not None, "memories of the text were given to a scorer that makes no keys"
        sums = [self.text_memory.sums(passage, seen) for passage in passages(batch, here, key_BTD)]
        if len(sums) == 1:
            return sums[0]
        return LogSums(torch.cat([part.hit_N for part in sums]), torch.cat([part.whole_N for part in sums]))

    @torch.inference_mode()
    def keys(self, batch: LMBatch) -> ScoredPositions:
        """Keys alone: no softmax is computed."""
        here, place_N = batch.to(self.device), self.places(batch)
        out = self.models[0](here.tokens_BT, key_tap=self.key_tap, **here.source)
        empty, target_N = torch.empty(0), here.target_BT.view(-1)[place_N]
        assert out.key_BTD is not None, "keys were asked of a scorer without a key tap"
        return ScoredPositions(_block_of(batch, place_N), target_N, empty, empty, out.key_BTD.flatten(0, 1)[place_N])

    def places(self, batch: LMBatch) -> Tensor:
        """int64 (N,): the scored positions, as places in the flattened batch."""
        # NumPy finds them without waking other threads, and on the host: a GPU would have to be waited for.
        return torch.from_numpy(np.flatnonzero(batch.scored_BT.numpy())).to(self.device)


def _mean_probability(logps: list[Tensor]) -> Tensor:
    """Log of the mean of the models' probabilities, float32."""
    logp = torch.stack([one.float() for one in logps])
    return logp[0] if len(logps) == 1 else torch.logsumexp(logp, 0) - torch.log(torch.tensor(len(logps)))


def _block_of(batch: LMBatch, place_N: Tensor) -> Tensor:
    """Number of the block that each place is in."""
    return batch.ids_B[torch.div(place_N.cpu(), batch.scored_BT.shape[1], rounding_mode="floor")]


def passages(batch: LMBatch, here: LMBatch, key_BTD: Tensor) -> Iterator[Passage]:
    """The blocks of a batch, without padding; ``here`` is the batch on the device of the keys."""
    scored_BT = batch.scored_BT.numpy()  # on the host, and without waking other threads
    ends_B = scored_BT.shape[1] - scored_BT[:, ::-1].argmax(1)
    for row, (number, end, scored) in enumerate(zip(batch.ids_B.tolist(), ends_B.tolist(), scored_BT.sum(1).tolist())):
        end = end if scored else 0
        value_T = torch.cat([here.tokens_BT[row, 1:end], here.target_BT[row, end - 1 : end]])
        yield Passage(number, key_BTD[row, :end], value_T, end - scored)
