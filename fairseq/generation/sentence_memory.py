"""SK-MT: every sentence has a small datastore of its own, of the pairs whose sources are most like it.

Shapes: B sentences of a batch, S live ones of N rows, R = S * N, P rows of a store, D width, V types, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.types import Candidates
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.data.bm25.similar_pairs import SimilarSources
    from fairseq.data.language_pair_dataset import LanguagePairDataset
    from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
    from fairseq.models.transformer_lm import TransformerLanguageModel

_TOKENS_AT_ONCE = 4096  # of both sides, padding included


class SentenceMemory:
    """Builds the stores of a batch: nothing is saved or indexed before.

    Source: arXiv 2302.12188, sec. 3.
    """

    def __init__(
        self,
        model: TransformerLanguageModel,
        dataset: LanguagePairDataset,
        similar: SimilarSources,
        mixer: VocabularyMixer,
        *,
        key_tap: str,
        num_pairs: int,
        k: int,
    ) -> None:
        """Args.

        model: of the translation; keys are its states in front of the pairs' targets.
        similar: finds pairs of ``dataset`` by their sources.
        num_pairs: pairs of each sentence's store.
        k: neighbours of a step.
        """
        self.model, self.dataset, self.similar, self.mixer = model, dataset, similar, mixer
        self.key_tap, self.num_pairs, self.k = key_tap, num_pairs, k

    def begin(self, source: Mapping[str, Any]) -> _BatchStores:
        """The stores of the sentences of a batch."""
        pad = self.dataset.source_side.pad
        sentences = [row_S[row_S != pad].cpu().numpy() for row_S in source["source_BS"]]
        pairs = [self.similar.nearest(sentence, self.num_pairs) for sentence in sentences]
        device = source["source_BS"].device
        rows = self._rows(sorted(set().union(*pairs)), device)
        found = [[rows[number] for number in numbers] for numbers in pairs]
        longest = max((sum(len(values) for _, values in some) for some in found), default=0)
        width = self.model.key_dim(self.key_tap)
        key_BPD = torch.zeros(len(found), longest, width, device=device)
        value_BP = torch.full((len(found), longest), -1, device=device)
        for place, some in enumerate(found):
            if some:
                values = torch.cat([values for _, values in some])
                key_BPD[place, : len(values)] = torch.cat([keys for keys, _ in some])
                value_BP[place, : len(values)] = values
        return _BatchStores(key_BPD, value_BP, self.mixer, min(self.k, longest), self.key_tap)

    def _rows(self, numbers: list[int], device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys (P, D) and tokens (P,) of pairs, by number."""
        scorer = SequenceScorer([self.model], key_tap=self.key_tap, device=device)
        order = sorted(numbers, key=lambda number: int(self.dataset.sizes[number]))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        while order:
            count = max(1, _TOKENS_AT_ONCE // (2 * int(self.dataset.sizes[order[-1]])))
            now, order = order[-count:], order[:-count]
            scored = scorer.keys(self.dataset.collate(np.array(now)))
            number_N, count_N = torch.unique_consecutive(scored.block_N, return_counts=True)
            keys, values = (torch.split(x, count_N.tolist()) for x in (scored.keys.float(), scored.target_N))
            found |= dict(zip(number_N.tolist(), zip(keys, values)))
        return found


@dataclass(frozen=True)
class _BatchStores:
    """The stores of a batch's sentences, searched exactly: a ``StepMemory``."""

    key_BPD: Tensor
    value_BP: Tensor
    """int64, -1 after the last row."""
    mixer: VocabularyMixer
    k: int
    key_tap: str

    def mix_(self, scores_RV: Tensor, query_RD: Tensor, sentence_R: Tensor) -> None:
        """See ``StepMemory``: each row searches its sentence's store."""
        if not self.k:
            self.mixer.normalize_(scores_RV)
            return
        own_S = sentence_R.unique_consecutive().to(query_RD.device)  # type: ignore[no-untyped-call]
        key_SPD, value_SP = self.key_BPD[own_S], self.value_BP[own_S]
        query_SND = query_RD.float().view(len(own_S), -1, query_RD.shape[1])
        rough_SNP = key_SPD.square().sum(2)[:, None] - 2 * torch.bmm(query_SND, key_SPD.transpose(1, 2))
        place_SNK = rough_SNP.masked_fill(value_SP[:, None] < 0, torch.inf).topk(self.k, 2, largest=False).indices
        place_RK = place_SNK.flatten(0, 1)
        at_R1 = torch.arange(len(own_S), device=place_RK.device).repeat_interleave(query_SND.shape[1])[:, None]
        value_RK = value_SP[at_R1, place_RK]
        distance_RK = (key_SPD[at_R1, place_RK] - query_RD.float()[:, None]).square().sum(2)
        near_RK, order_RK = distance_RK.masked_fill(value_RK < 0, torch.inf).sort(1)
        value_RK = value_RK.gather(1, order_RK)
        self.mixer.mix_(scores_RV, None, Candidates(value_RK, -near_RK, value_RK >= 0))
