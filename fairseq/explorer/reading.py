"""Typed text, scored as the opened text is, and the distribution of the token that comes next.

Shapes: T tokens, N = T + 1 positions (the first one has read nothing but the beginning), D key width, V vocabulary,
K candidates, M of the local memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.explanation import Explanation, top_words
from fairseq.explorer.export import content_of
from fairseq.explorer.packing import pack
from fairseq.explorer.text_table import TableWriter
from fairseq.memory.scoring import log_sums
from fairseq.memory.types import Array, Candidates

LONGEST = 256
"""Tokens that are read at once: each has its neighbours looked up and shown."""


@dataclass(frozen=True)
class ModelRun:
    """What a model makes of a text."""

    lm_logp_T: Tensor
    """float32 ln p of each token."""
    norm_N: Tensor
    """float32 log-sum of the vocabulary's scores."""
    key_ND: Tensor
    """Memory keys."""
    logp_at: Callable[[int], Tensor]
    """ln p of every token at one position, (V,)."""


@dataclass(frozen=True)
class Found:
    """Candidates of some positions, and how a RetoMaton came by them."""

    candidates: Candidates
    rows_NK: Tensor
    """int64 rows of the datastore, -1 where there is none."""
    searched_N: Tensor | None = None
    pointers_N: Tensor | None = None


class TypedReader:
    """Reads typed text with a language model and its memories."""

    def __init__(
        self,
        base: Explanation,
        encode: Callable[[str], list[int]],
        run: Callable[[list[int]], ModelRun],
        look_up: Callable[[Tensor, Tensor], Found] | None,
        *,
        longest: int,
        num_types: int,
        local: Callable[[Tensor, Tensor], Candidates] | None = None,
    ) -> None:
        """Args.

        base: of the opened text, whose settings and words count here too.
        look_up: the external memory, given keys (N, D) and the tokens that come next (N,); None without one.
        longest: tokens that the model reads at once.
        num_types: size of the vocabulary.
        local: the local memory, given the same.
        """
        self.base, self.encode, self._run, self._look_up, self._local = base, encode, run, look_up, local
        self.longest, self._num_types = min(LONGEST, longest), num_types

    def read(self, tokens: list[int], *, only_next: bool) -> dict[str, Any]:
        """See ``Reader``. Raises: ValueError for a token that the model does not have."""
        for token in tokens:
            if not 0 <= token < self._num_types:
                raise ValueError(f"token {token} is not within the {self._num_types} of this model")
        run = self._run(tokens)
        next_N = torch.tensor([*tokens, 0])
        found = None if self._look_up is None else self._look_up(run.key_ND, next_N)
        local = None if self._local is None else self._local(run.key_ND, next_N)
        content: dict[str, Any] = {"ids": tokens, "next": self._next(run, found, local)}
        if not only_next and tokens:
            content |= self._scored(tokens, run, found, local)
        return content

    def _next(self, run: ModelRun, found: Found | None, local: Candidates | None) -> dict[str, Any]:
        """The schema's ``details`` for the token after the last."""
        last, known = len(run.norm_N) - 1, set[int]()
        content: dict[str, Any] = {"norm": pack(run.norm_N[last:].numpy(), "float32"), "candidates": None}
        if found is not None:
            scores_K, values_K, rows_K = _arrays(found, last)
            content["candidates"] = {
                "first": last,
                "scores": pack(scores_K[None], "float32"),
                "values": pack(values_K[None], "int32"),
            }
            content["neighbors"], known = self.base.shown(scores_K, values_K, rows_K, target=-1)
        if local is not None:
            content["local_candidates"] = local_candidates(local, last)
            known |= set(local.values_NM[0].tolist())
        lm = top_words(run.logp_at(last), np.array(sorted(known), np.int64))
        known |= set(lm.pop("numbers"))
        words = {str(token): self.base.neighbors.words.word(token) for token in sorted(known)}
        return content | {"lm": lm, "words": words}

    def _scored(
        self, tokens: Sequence[int], run: ModelRun, found: Found | None, local: Candidates | None
    ) -> dict[str, Any]:
        """The explanation of the tokens themselves."""
        count, base = len(tokens), self.base
        more = [] if found is None or found.searched_N is None else ["searched", "pointers"]
        width = 0 if found is None else found.candidates.scores_NM.shape[1]
        writer = TableWriter(count, width, more=more, sources=base.table.sources)
        places = np.arange(count)
        if found is not None:
            if found.searched_N is not None and found.pointers_N is not None:
                writer.write(places, searched=found.searched_N[:count], pointers=found.pointers_N[:count])
            writer.write_candidates(places, found.candidates.rows(slice(0, count)), found.rows_NK[:count])
        target_T = torch.tensor(tokens)
        for name in base.table.sources:  # a text that begins has no other memory of its own than the local one
            hit, whole = torch.full((count,), -torch.inf), torch.full((count,), -torch.inf)
            if name == "local" and local is not None:
                part = Candidates(local.values_NM, local.scores_NM[:count], local.keep_NM[:count])
                sums = log_sums(part, target_T, base.opening.joint_temperature or 1.0)
                hit, whole = sums.hit_N, sums.whole_N
            writer.table.columns[f"hit:{name}"][:], writer.table.columns[f"whole:{name}"][:] = hit, whole
        writer.write(places, token=tokens, counted=True, norm=run.norm_N[:count].numpy(), lm=run.lm_logp_T.numpy())

        def position(at: int) -> dict[str, Any]:
            also = [tokens[at]]
            if found is not None:
                scores_K, values_K, _ = _arrays(found, at)
                also += values_K[np.isfinite(scores_K)].tolist()
            shown: dict[str, Any] = {}
            if local is not None:
                shown["local_candidates"] = local_candidates(local, at)
                also += local.values_NM[0].tolist()
            return shown | {"lm": top_words(run.logp_at(at), np.array(also, np.int64))}

        # All candidates count in what is typed, however few there are beside those of the opened text.
        opening = replace(base.opening, k=None if base.opening.k is None else min(base.opening.k, width))
        typed = replace(
            base, title="typed text", table=writer.table, opening=opening, notes=(), position=position, reader=None
        )
        return content_of(typed, slice(0, count))


def local_candidates(local: Candidates, at: int) -> dict[str, Any]:
    """The local memory of one position as the schema has it; only what it may use."""
    keep_M = local.keep_NM[at].cpu()
    scores_M, values_M = local.scores_NM[at].float().cpu()[keep_M], local.values_NM[0].cpu()[keep_M]
    return {"scores": pack(scores_M.numpy(), "float32"), "values": pack(values_M.numpy(), "int32")}


def _arrays(found: Found, at: int) -> tuple[Array, Array, Array]:
    """Scores, values and rows of one position's candidates; -inf and -1 where there is none."""
    keep_K = found.candidates.keep_NM[at].cpu()
    scores_K = found.candidates.scores_NM[at].float().cpu().masked_fill(~keep_K, -math.inf)
    rows_K = found.rows_NK[at].cpu().masked_fill(~keep_K, -1)
    return scores_K.numpy(), found.candidates.values_NM[at].int().cpu().numpy(), rows_K.numpy()
