"""RetoMaton in any transformers model: neighbours by following pointers, searched only where these run dry."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.attachment import ForwardCall
from fairseq.hf.hooks.patching import replace_attribute
from fairseq.hf.hooks.protocols import KeyValueCache, ModelOutput
from fairseq.hf.hooks.taps import Tap
from fairseq.hf.knn.stores import find_members
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.retomaton.automaton import Retomaton, RetomatonState, RetomatonStep
from fairseq.memory.retomaton.foreign_clusters import open_clusters
from fairseq.memory.retomaton.reader import read_text
from fairseq.memory.scoring import interpolate, knn_logp
from fairseq.memory.types import Candidates

_AHEAD = 4096
"""Positions at least that a bulk search before their turn is weighed for."""


class RetomatonWrapper(KNNWrapper):
    """RetoMaton for a transformers model: follows the text after the last neighbours; searches where too few follow.

    Each sequence has a state of its own. It travels with the key-value cache, follows beams, and begins empty with an
    empty cache. ``num_positions``, ``num_searched`` and ``saved_share`` count since ``break_into``.

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
        logp_N = lm_logp_N.float().cpu().clone()
        target_N = target_N.cpu()

        def use(place_B: Tensor, candidates: Candidates) -> None:
            lm_logp_B = logp_N[place_B]
            mixed_B = interpolate(lm_logp_B, knn_logp(candidates, target_N[place_B], self.knn_temp), self.lmbda)
            logp_N[place_B] = torch.where(candidates.keep_NM.any(1), mixed_B, lm_logp_B)

        lengths_B = torch.tensor([len(key_ND)]) if lengths_B is None else lengths_B
        self._read(key_ND.cpu(), target_N, lengths_B, use, None)
        return logp_N

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        super()._prepare(model, tap)
        path = self._members or find_members(self.memory.store.prefix)
        clusters = open_clusters(path, self.memory.store) if path else None
        settings: dict[str, Any] = self._settings_of_automaton
        self._automaton = Retomaton(self.memory, clusters=clusters, compat=self.flattens_batches, **settings)
        self.num_positions = self.num_searched = 0
        self._pending = _Pending(model)

    def _end(self, *, failed: bool) -> None:
        super()._end(failed=failed)
        self._pending.remove()
        self._automaton = None

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        self._step = self._pending.before(named)
        return super()._changed_call(named)

    def _mix(self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor, output: ModelOutput) -> Tensor | None:
        ids_BT = call.input_ids
        state = None
        if self._step is not None and ids_BT is not None and len(ids_BT) == len(self._step.rows_BM):
            state = self.automaton.follow(self._step, ids_BT[:, 0])
        if call.target() is not None:
            return self._mix_labelled(call, key_BTD, logits_BLV, state)
        state = self.automaton.start(len(logits_BLV)) if state is None else state
        step = self._mix_open(call, key_BTD, logits_BLV, ids_BT, state)
        self._pending.after(output, step)
        return None

    def _mix_labelled(
        self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor, state: RetomatonState | None
    ) -> Tensor:
        """Positions that predict a label that counts; each is followed by its label."""
        scores_RV, key_RD, rows_N, target_R = self._flat(call, key_BTD, logits_BLV)
        assert rows_N is not None
        assert target_R is not None
        target_N = target_R[rows_N]
        lengths_B = torch.bincount((rows_N // logits_BLV.shape[1]).cpu(), minlength=len(logits_BLV))
        if self.flattens_batches:
            lengths_B, state = lengths_B.sum()[None], None
        logp_N = torch.empty(len(rows_N), device=scores_RV.device)

        def use(place_B: Tensor, candidates: Candidates) -> None:
            place_B = place_B.to(scores_RV.device)
            mixed_B = self._mixer.mix_(scores_RV, rows_N[place_B], candidates, target_N[place_B])
            assert mixed_B is not None
            logp_N[place_B] = mixed_B

        self._read(key_RD[rows_N], target_N, lengths_B, use, state)
        self._normalize_rest(scores_RV, rows_N)
        return logp_N

    def _mix_open(
        self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor, ids_BT: Tensor | None, state: RetomatonState
    ) -> RetomatonStep:
        """Positions without labels: all but the last of each sequence are followed by the next input."""
        scores_RV, key_RD, rows_N, _ = self._flat(call, key_BTD, logits_BLV)
        num_scores = logits_BLV.shape[1]
        last_B = torch.arange(1, len(logits_BLV) + 1, device=key_RD.device) * num_scores - 1
        if num_scores > 1 and ids_BT is not None:
            all_N = torch.arange(len(scores_RV), device=key_RD.device) if rows_N is None else rows_N
            sequence_N = all_N // num_scores
            # The last position that is text; of a sequence that is all padding, the last one.
            text_B = torch.full_like(last_B, -1).scatter_reduce(0, sequence_N, all_N, "amax")
            last_B = torch.where(text_B < 0, last_B, text_B)
            first_N = all_N[all_N != last_B[sequence_N]]
            next_R = call.kept(torch.nn.functional.pad(ids_BT[:, 1:], (0, 1)), num_scores).reshape(-1)

            def use(place_B: Tensor, candidates: Candidates) -> None:
                self._mixer.mix_(scores_RV, first_N[place_B.to(first_N.device)], candidates)

            lengths_B = torch.bincount((first_N // num_scores).cpu(), minlength=len(last_B))
            state = self._read(key_RD[first_N], next_R[first_N], lengths_B, use, state)
        step = self.automaton.lookup(key_RD[last_B], state)
        self.num_positions += len(last_B)
        self.num_searched += int(step.searched_B.sum())
        if num_scores == 1:
            self._mixer.mix_(scores_RV, None, step.found)
        else:
            self._mixer.mix_(scores_RV, last_B, step.found)
            self._normalize_rest(scores_RV, last_B if rows_N is None else rows_N)
        return step

    def _read(
        self,
        key_ND: Tensor,
        token_N: Tensor,
        lengths_B: Tensor,
        use: Callable[[Tensor, Candidates], None],
        state: RetomatonState | None,
    ) -> RetomatonState:
        done = read_text(self.automaton, key_ND, token_N, lengths_B, use, state, ahead=self._pays_ahead(len(key_ND)))
        self.num_positions += len(key_ND)
        self.num_searched += done.num_searched
        return done.state

    def _pays_ahead(self, num_positions: int) -> bool:
        """True if all positions should be searched at once, before it is known which need it: a bulk costs less."""
        index = self.memory.index
        if self.flattens_batches:  # the original's figures hang on how its searches round
            return False
        return index.bulk_pays(min(num_positions, _AHEAD))


class _Pending:
    """The latest step of the sequences in each key-value cache, until their next tokens are known."""

    def __init__(self, model: nn.Module) -> None:
        self._steps: weakref.WeakKeyDictionary[KeyValueCache, tuple[int, RetomatonStep]] = weakref.WeakKeyDictionary()
        self._reorder: Any = getattr(model, "_reorder_cache", None)
        # ``generate`` reorders the cache by this method where a model has one: beams take their steps along.
        self._restore = replace_attribute(model, "_reorder_cache", self.reorder)

    def before(self, named: Mapping[str, Any]) -> RetomatonStep | None:
        """The step that the given cache ends with; None where a sequence begins, or was cut in the meantime."""
        cache = _cache(named)
        length, step = self._steps.pop(cache, (0, None)) if cache is not None else (0, None)
        is_whole = cache is not None and length == cache.get_seq_length()
        return step if is_whole else None

    def after(self, output: ModelOutput, step: RetomatonStep) -> None:
        """Keep a step with the cache that came out of the call."""
        cache = _cache(output)
        if cache is not None:
            self._steps[cache] = (cache.get_seq_length(), step)

    def reorder(self, cache: KeyValueCache, beam_idx: Tensor) -> KeyValueCache:
        """Reorder a cache as ``generate`` would, and the steps of its sequences with it."""
        waiting = self._steps.pop(cache, None)
        if self._reorder is not None:
            cache = self._reorder(cache, beam_idx)
        else:
            cache.reorder_cache(beam_idx)
        if waiting is not None:
            self._steps[cache] = (waiting[0], waiting[1].select(beam_idx))
        return cache

    def remove(self) -> None:
        """Leave the model as it was."""
        self._restore()
        self._steps.clear()


def _cache(named: Mapping[str, Any] | ModelOutput) -> KeyValueCache | None:
    """The key-value cache among arguments or results, if there is one that has a length."""
    for name in ("cache", "past_key_values"):
        cache: KeyValueCache | None = named.get(name)
        if cache is not None and hasattr(cache, "get_seq_length"):
            return cache
    return None
