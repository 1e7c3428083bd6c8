"""Facts about positions and neighbours that learned combiners ask for, read from the datastore and the model.

Shapes: N positions, M neighbours, D width of the keys, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fairseq.memory.combiners.learned import with_model
from fairseq.memory.types import Candidates, NeighborFacts

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

_OF_MODEL = frozenset({"model_logp_NM", "top_logp_NM", "stored_logp_NM"})
_ROWS_AT_ONCE = 1024  # positions whose vocabulary scores are held at once


class OutputLayer(Protocol):
    """What is needed of a model: the distribution that its last state stands for."""

    def vocab_logp(self, hidden_ND: Tensor) -> Tensor:
        """ln p of every type, (N, V)."""
        ...

    def target_logp(self, hidden_ND: Tensor, target_N: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """ln p of each target and the log-sum of the vocabulary, (N,)."""
        ...


class FactReader:
    """Adds facts to candidates."""

    def __init__(self, needs: frozenset[str], store: Datastore, model: OutputLayer, key_tap: str) -> None:
        """Args.

        needs: names of fields of ``NeighborFacts``.
        store: the candidates' datastore.
        key_tap: inner state of the model that is the key.
        Raises: ValueError when the keys are missing, or are not what the model's distribution is made of.
        """
        self.needs, self.store, self.model = needs, store, model
        self._reads_keys = bool(needs & {"key_NMD", "stored_logp_NM"})
        if self._reads_keys and not store.has_keys:
            raise ValueError(
                f"the combiner reads keys, datastore {store.prefix!r} was opened without them; drop --no-load-keys"
            )
        if needs & _OF_MODEL and key_tap != "model_output":
            raise ValueError(
                f"the combiner reads the model's probabilities from its keys, which are {key_tap}; save the datastore "
                "with --knn-keytype model_output"
            )

    @torch.no_grad()
    def __call__(self, found: Candidates, query_ND: Tensor) -> Candidates:
        """The candidates with all facts but those about the model's distribution at the positions."""
        key_NMD = self._keys(found) if self._reads_keys else None
        stored_logp_NM = None
        if "stored_logp_NM" in self.needs:
            assert key_NMD is not None
            value_NM = found.values_NM.long().clamp_min(0)
            hidden_LD = key_NMD.flatten(0, 1).to(query_ND.dtype)
            stored_logp_NM = self.model.target_logp(hidden_LD, value_NM.flatten(), _ROWS_AT_ONCE)[0]
            stored_logp_NM = stored_logp_NM.view_as(found.scores_NM)
        facts = NeighborFacts(
            query_ND=query_ND if "query_ND" in self.needs else None,
            key_NMD=key_NMD if "key_NMD" in self.needs else None,
            stored_logp_NM=stored_logp_NM,
        )
        return dataclasses.replace(found, facts=facts)

    @torch.no_grad()
    def with_model(self, found: Candidates, query_ND: Tensor) -> Candidates:
        """The candidates of :meth:`__call__` with the facts about the model's distribution, where targets are given."""
        if not self.needs & {"model_logp_NM", "top_logp_NM"} or not len(query_ND):
            return found
        starts = range(0, len(query_ND), _ROWS_AT_ONCE)
        parts = [slice(start, min(start + _ROWS_AT_ONCE, len(query_ND))) for start in starts]
        given = [with_model(found.rows(p), self.model.vocab_logp(query_ND[p]), self.needs).facts for p in parts]
        assert found.facts is not None, "they are added first"
        made = {
            name: torch.cat([getattr(facts, name) for facts in given])
            for name in self.needs & {"model_logp_NM", "top_logp_NM"}
        }
        return dataclasses.replace(found, facts=dataclasses.replace(found.facts, **made))

    def _keys(self, found: Candidates) -> Tensor:
        assert found.rows_NM is not None, "candidates of a datastore name their rows"
        rows_NM = found.rows_NM.cpu()
        key_NMD = self.store.keys.take(rows_NM.clamp_min(0).reshape(-1)).view(*rows_NM.shape, -1)
        return key_NMD.masked_fill_((rows_NM < 0)[:, :, None], 0.0).to(found.scores_NM.device)
