"""RetoMaton in any transformers model: neighbours by following pointers, searched only where these run dry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.attachment import ForwardCall
from fairseq.hf.hooks.continuous_batching import rejecting_continuous_batching
from fairseq.hf.hooks.key_value_cache import cache_of, num_cached
from fairseq.hf.hooks.protocols import ModelOutput
from fairseq.hf.hooks.taps import Tap
from fairseq.hf.knn.cached_steps import StepKeeper, max_steps
from fairseq.hf.knn.gradient import MixedScores
from fairseq.hf.knn.runs import Runs, StepLog, find_runs
from fairseq.hf.knn.stores import find_members
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.retomaton.automaton import Retomaton, RetomatonState, RetomatonStep
from fairseq.memory.retomaton.foreign_clusters import open_clusters
from fairseq.memory.retomaton.reader import read_text
from fairseq.memory.retomaton.walk import can_walk, walk_text
from fairseq.memory.scoring import interpolate, log_share
from fairseq.memory.sources.log_sums import log_sums
from fairseq.memory.types import Candidates

_AHEAD = 4096
"""Positions at least that a bulk search before their turn is weighed for."""
_AT_ONCE = 512
"""Positions of different sequences that are looked up together."""
_CONTINUOUS_BATCHING = (
    "RetomatonWrapper does not follow the sequences of continuous batching (generate_batch), whose requests share one "
    "row and one cache; use model.generate, or KNNWrapper, which has no state"
)


class RetomatonWrapper(KNNWrapper):
    """RetoMaton for a transformers model: follows the text after the last neighbours; searches where too few follow.

    Each sequence has a state of its own, at its position. It travels with the key-value cache, which may be reordered,
    cropped and copied; where positions are skipped or a packed row begins another sequence, it begins empty.
    ``num_positions``, ``num_searched`` and ``saved_share`` count since ``break_into``.

    Source: arXiv 2201.12431, sec. 3.

    ```python
    with RetomatonWrapper(dstore_dir="gpt2-store", k=8, min_knns=4)(model) as reto:
        model.generate(ids_BT[:, :4], max_new_tokens=4, pad_token_id=0)
    print(f"{reto.saved_share:.0%} of the searches saved")
    ```
    """

    def __init__(
        self,
        no_pointer: bool = False,
        min_knns: int = 1,
        max_knns: int = 1024,
        members: str | Path | None = None,
        *,
        compat: bool = False,
        **knn: Any,
    ) -> None:
        """Args.

        no_pointer: follow nothing; every position is searched.
        min_knns: active pointers needed to skip a search.
        max_knns: limit on active pointers.
        members: file of the clusters, ours or a ``members_*.pkl``; by default the one beside the store, if any.
        compat: reproduce the original program: a row counts as often as it is reached, and the sequences of a batch are
            read as one that begins empty at each call.
        knn: arguments of ``KNNWrapper``.
        Raises: ValueError when a number is impossible.
        """
        super().__init__(**knn)
        for what, value in (("min_knns", min_knns), ("max_knns", max_knns)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self._settings_of_automaton = {"no_pointer": no_pointer, "min_knns": min_knns, "max_knns": max_knns}
        self._members, self.flattens_batches = members, compat
        self._automaton: Retomaton | None = None
        self.num_positions = self.num_searched = 0

    @property
    def automaton(self) -> Retomaton:
        """The automaton over the store, open while this is attached to a model."""
        assert self._automaton is not None, "not in a model"
        return self._automaton

    @property
    def saved_share(self) -> float:
        """Share of positions that needed no search, 0 to 1; 0 before the first."""
        return 1.0 - self.num_searched / max(1, self.num_positions)

    def target_logp(
        self, key_ND: Tensor, lm_logp_N: Tensor, target_N: Tensor, lengths_B: Tensor | None = None
    ) -> Tensor:
        """As ``KNNWrapper.target_logp``; sequence after sequence, of ``lengths_B`` positions each (by default one)."""
        lm_logp_N, target_N = lm_logp_N.float().cpu(), target_N.cpu()
        lengths_B = torch.tensor([len(key_ND)]) if lengths_B is None else lengths_B
        if self.record is None and self._pays_ahead(len(key_ND)) and can_walk(self.automaton):
            sums, num_searched = walk_text(self.automaton, key_ND, target_N, lengths_B, self.knn_temp)
            self.num_positions, self.num_searched = self.num_positions + len(key_ND), self.num_searched + num_searched
            memory_logp_N, has_memory_N = log_share(sums.hit_N, sums.whole_N), sums.whole_N != -torch.inf
        else:
            memory_logp_N, has_memory_N = self._read_logp(key_ND.cpu(), target_N, lengths_B)
        return torch.where(has_memory_N, interpolate(lm_logp_N, memory_logp_N, self.lmbda), lm_logp_N)

    def _read_logp(self, key_ND: Tensor, target_N: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the candidates alone give to the targets, and whether there are any, position by position."""
        memory_logp_N, has_memory_N = torch.empty(len(key_ND)), torch.zeros(len(key_ND), dtype=torch.bool)

        def use(place_B: Tensor, candidates: Candidates) -> None:
            sums = log_sums(candidates, target_N[place_B], self.knn_temp)
            memory_logp_N[place_B] = log_share(sums.hit_N, sums.whole_N)
            has_memory_N[place_B] = candidates.keep_NM.any(1)

        self._read(key_ND, target_N, lengths_B, use, None, keep=self.record)
        return memory_logp_N, has_memory_N

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        super()._prepare(model, tap)
        path = self._members or find_members(self.memory.store.prefix)
        clusters = open_clusters(path, self.memory.store) if path else None
        settings: dict[str, Any] = self._settings_of_automaton
        self._automaton = Retomaton(self.memory, clusters=clusters, compat=self.flattens_batches, **settings)
        self.num_positions = self.num_searched = 0
        self._keeper = StepKeeper()
        self._undo.enter_context(rejecting_continuous_batching(model, _CONTINUOUS_BATCHING))

    def _end(self, *, failed: bool) -> None:
        super()._end(failed=failed)
        self._keeper.close()
        self._automaton = None

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        cache = cache_of(named)
        if any(each.__name__ == "PagedAttentionCache" for each in type(cache).__mro__):
            raise ValueError(_CONTINUOUS_BATCHING)
        return super()._changed_call(named)

    def _mix_step_(self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor) -> bool:
        """Not at all: each step begins with what the last one found."""
        return False

    def _mix(self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor, output: ModelOutput) -> MixedScores:
        scores_RV, key_RD, rows_N, target_R = self._flat(call, key_BTD, logits_BLV)
        has_memory_R = torch.zeros(len(scores_RV), dtype=torch.bool, device=scores_RV.device)
        length, before = self._keeper.find(cache_of(call.named), call.num_cached)
        flattens = self.flattens_batches and target_R is not None
        runs = find_runs(call, logits_BLV, rows_N, target_R, flattens=flattens)
        log = StepLog(runs, max_steps(len(logits_BLV), self.memory.k + self.automaton.max_knns))
        cache = cache_of(output) if target_R is None else None
        target_logp_N = torch.empty(len(runs.rows_N), device=scores_RV.device)

        def use(place_B: Tensor, candidates: Candidates) -> None:
            place_B = place_B.to(scores_RV.device)
            at_B = runs.rows_N[place_B]
            has_memory_R[at_B] = candidates.keep_NM.any(1)
            rows_B = None if len(at_B) == len(scores_RV) else at_B  # all are then in their order, and mixed in place
            targets = None if target_R is None else runs.token_N[place_B]
            mixed_B = self._mixer.mix_(scores_RV, rows_B, candidates, targets)
            if mixed_B is not None:
                target_logp_N[place_B] = mixed_B

        if len(runs.rows_N):
            self._read(
                key_RD[runs.rows_N], runs.token_N, runs.lengths, use, self._state_of(runs, call, before),
                keep=None if cache is None else log.keep,
            )  # fmt: skip
        if len(runs.rows_N) < len(scores_RV):
            self._normalize_rest(scores_RV, runs.rows_N)
        if cache is not None:
            after = num_cached(cache)
            after = length + runs.num_positions if after is None else after
            self._keeper.keep(cache, after, log.by_length(after))
        if target_R is None:
            return MixedScores(logits_BLV, has_memory_R)
        return MixedScores(logits_BLV, has_memory_R, target_logp_N, runs.rows_N, runs.token_N)

    def _state_of(self, runs: Runs, call: ForwardCall, before: RetomatonStep | None) -> RetomatonState | None:
        """States that the runs begin with: those that continue what a cache holds follow its last step."""
        ids_BT = call.input_ids
        if before is None or ids_BT is None or len(before.rows_BM) != len(ids_BT) or not bool(runs.continues.any()):
            return None
        followed = self.automaton.follow(before, ids_BT[:, 0])
        return followed.select(runs.sequences).reset(~runs.continues)

    def _read(
        self,
        key_ND: Tensor,
        token_N: Tensor,
        lengths_B: Tensor,
        use: Callable[[Tensor, Candidates], None],
        state: RetomatonState | None,
        keep: Callable[[Tensor, RetomatonStep], None] | None = None,
    ) -> None:
        """Look up the positions of runs, and count them."""
        self.num_positions += len(key_ND)
        if len(lengths_B) == len(key_ND) <= _AT_ONCE:  # one position each, as in generation: nothing is followed yet
            step = self.automaton.lookup(key_ND, self.automaton.start(len(key_ND)) if state is None else state)
            place_N = torch.arange(len(key_ND))
            use(place_N, step.found)
            if keep is not None:
                keep(place_N, step)
            self.num_searched += int(step.searched_B.sum())
            return
        ahead = self._pays_ahead(len(key_ND))
        done = read_text(self.automaton, key_ND, token_N, lengths_B, use, state, ahead=ahead, keep=keep)
        self.num_searched += done.num_searched

    def _pays_ahead(self, num_positions: int) -> bool:
        """True if all positions should be searched at once, before it is known which need it: a bulk costs less."""
        index = self.memory.index
        if self.flattens_batches:  # the original's figures hang on how its searches round
            return False
        return index.bulk_pays(min(num_positions, _AHEAD))
