"""The explanation of a scored text: the one form in which the page, its export and other programs get every kind.

``docs/explorer.md`` describes the schema; ``schema.py`` checks it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.packing import pack
from fairseq.explorer.rules import GIVEN, Rule, Setting
from fairseq.explorer.text_table import TextTable
from fairseq.explorer.words import words_of
from fairseq.memory.types import Array
from fairseq.metrics.word_loss import loss_sums

FORMAT, VERSION = "fairseq-memory explanation", 1
SHOWN_NEIGHBORS, SHOWN_WORDS = 12, 30
"""Neighbours of a token that are shown in their contexts, and most probable words of the model."""
MOST_AT_ONCE = 20_000
"""Tokens that one request gets."""
_PART_NUMBERS = 1 << 22  # candidates that are combined at a time


class Reader(Protocol):
    """A model that reads a text as it is typed."""

    longest: int
    """Tokens that it reads at once."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        ...

    def read(self, tokens: list[int], *, only_next: bool) -> dict[str, Any]:
        """``next`` (see ``docs/explorer.md``), and unless ``only_next`` the explanation of the tokens themselves."""
        ...


@dataclass
class Explanation:
    """A scored text, its memory and what is known about both."""

    kind: str
    """knn, retomaton, trime, translation or extended-mind."""
    title: str
    table: TextTable
    neighbors: NeighborTexts
    rule: Rule = Rule()
    opening: Setting = Setting()
    """The setting of the evaluation, which the page opens with."""
    metric: str = "l2"
    """Kind of the similarities: ``l2`` (minus the squared distance), ``ip`` or ``cos``."""
    unit: str = "document"
    """What the numbers in column ``document`` count."""
    notes: tuple[str, ...] = ()
    """Sentences that the page shows once."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Names of model, store and text, for people."""
    position: Callable[[int], dict[str, Any]] | None = field(default=None, repr=False)
    """More about a token, computed when somebody looks at it: ``lm``, ``mixed``, ``attention``, ``sentence``."""
    reader: Reader | None = field(default=None, repr=False)
    progress: Callable[[], str | None] = field(default=lambda: None, repr=False)
    """Why scoring stopped before its end, if it did."""
    working: Callable[[], bool] = field(default=lambda: False, repr=False)
    """True while tokens are scored."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._columns: dict[Setting, tuple[Array, Array, Array]] = {}
        self._counts: Array | None = None

    def about(self) -> dict[str, Any]:
        """Everything but the tokens."""
        failure = self.progress()
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "title": self.title,
            "num_tokens": len(self.table),
            "num_ready": self.table.num_ready,
            "k": self.table.k,
            "first": 0,
            "separator": self.neighbors.words.separator,
            "rule": self.rule.to_dict(),
            "setting": self.opening.to_dict(),
            "metric": self.metric,
            "unit": self.unit,
            "sources": self.table.sources,
            "notes": [*self.notes, *([failure] if failure else [])],
            "failed": failure is not None,
            "working": self.working(),
            "facts": dict(self.facts),
            "reads": self.reader is not None,
            "longest": self.reader.longest if self.reader is not None else 0,
        }

    def rows(self, first: int, stop: int) -> slice:
        """Some tokens. Raises: ValueError for a range that is not within the text."""
        if not 0 <= first <= stop <= len(self.table):
            raise ValueError(f"tokens {first} to {stop} are not within the {len(self.table)} of this text")
        return slice(first, stop)

    def tokens(self, rows: slice, *, text: bool = True) -> dict[str, Any]:
        """Columns of some tokens, and their text."""
        table, token_n = self.table, self.table.columns["token"][rows]
        with self._lock:
            kept = self._columns.get(self.opening)
        parts = self._combined(rows, self.opening) if kept is None else tuple(column[rows] for column in kept)
        memory_n, mixed_n, nearest_n = parts
        columns = {name: pack(table.columns[name][rows], "int32") for name in ("token", "block", "document")}
        columns |= {name: pack(table.columns[name][rows], "float32") for name in ("lm", "norm")}
        columns |= {"memory": pack(memory_n, "float32"), "mixed": pack(mixed_n, "float32")}
        columns |= {"counted": pack(table.columns["counted"][rows], "uint8")}
        columns |= {"nearest": pack(nearest_n, "float32"), "frequency": pack(self._frequency(token_n), "int32")}
        for name, dtype in (("searched", "uint8"), ("pointers", "int32")):
            if name in table.columns:
                columns[name] = pack(table.columns[name][rows], dtype)
        for name in table.sources:
            columns |= {f"{x}:{name}": pack(table.columns[f"{x}:{name}"][rows], "float32") for x in ("hit", "whole")}
        content: dict[str, Any] = {"first": rows.start, "columns": columns}
        if text:
            content["text"] = words_of(self.neighbors.words, token_n)
        return content

    def candidates(self, rows: slice) -> dict[str, Any] | None:
        """Similarities and values of all candidates of some tokens, from which the page recombines."""
        arrays = self.table.candidates(rows)
        if arrays is None:
            return None
        scores, values = pack(arrays.scores_nK, "float32"), pack(arrays.values_nK, "int32")
        return {"first": rows.start, "scores": scores, "values": values}

    def details(self, at: int) -> dict[str, Any]:
        """More about one token: its neighbours in their contexts, and what the model says at its place.

        Raises: ValueError for a token that the text has not, or that is not scored yet.
        """
        if not 0 <= at < len(self.table):
            raise ValueError(f"token {at} is not within the {len(self.table)} of this text")
        if np.isnan(self.table.columns["lm"][at]):
            raise ValueError(f"token {at} is not scored yet; ask again in a moment")
        content: dict[str, Any] = {"at": at}
        known = {int(self.table.columns["token"][at])}
        arrays = self.table.candidates(slice(at, at + 1))
        if arrays is not None:
            scores_K, values_K, rows_K = (array[0] for array in arrays)
            shown, values = self.shown(scores_K, values_K, rows_K, int(self.table.columns["token"][at]))
            content["neighbors"] = shown
            known |= values
        more = self.position(at) if self.position is not None else {}
        content |= more
        for name in ("lm", "mixed"):
            if name in more:
                known |= set(more[name].pop("numbers"))
        return content | {"words": {str(token): self.neighbors.words.word(token) for token in sorted(known)}}

    def shown(
        self, scores_K: Array, values_K: Array, rows_K: Array, target: int
    ) -> tuple[list[dict[str, Any]], set[int]]:
        """The closest neighbours of a token in their contexts, and the tokens of all of them."""
        found_K = np.isfinite(scores_K)
        places = np.argsort(-scores_K, kind="stable")
        places = places[found_K[places]][:SHOWN_NEIGHBORS]
        shown = self.neighbors.show(rows_K[places], values_K[places], scores_K[places], places, target)
        return shown, set(values_K[found_K].tolist())

    def combined(self, setting: Setting) -> dict[str, Any]:
        """The whole text at another setting: its columns and its perplexity. Raises: ValueError for such a setting."""
        setting.check(self.table.k)
        memory_N, mixed_N, _ = self._whole(setting)
        return {
            "setting": setting.to_dict(),
            "memory": pack(memory_N, "float32"),
            "mixed": pack(mixed_N, "float32"),
            "sums": {"lm": self._sums(self.table.columns["lm"]), "mixed": self._sums(mixed_N)},
        }

    def _sums(self, logp_N: Array) -> dict[str, Any]:
        """Perplexity of the tokens that are scored, as an evaluation reports it."""
        columns = self.table.columns
        known_N = ~np.isnan(logp_N)
        sums = loss_sums(columns["block"][known_N], ~columns["counted"][known_N], logp_N[known_N].astype(np.float64))
        perplexity, loss = (x if np.isfinite(x) else None for x in (sums.perplexity, sums.loss_base2))
        found = {"perplexity": perplexity, "loss_base2": loss, "num_tokens": sums.num_tokens}
        return found | {"num_counted": sums.num_counted, "num_impossible": sums.num_impossible}

    def _whole(self, setting: Setting) -> tuple[Array, Array, Array]:
        """Columns of the whole text at a setting; those of the last settings are kept once all is scored."""
        with self._lock:
            kept = self._columns.get(setting)
        if kept is not None:
            return kept
        complete = self.table.num_ready == len(self.table)
        made = self._combined(slice(0, len(self.table)), setting)
        if complete:
            with self._lock:
                if len(self._columns) >= 4:
                    self._columns.pop(next(iter(self._columns)))
                self._columns[setting] = made
        return made

    def _combined(self, rows: slice, setting: Setting) -> tuple[Array, Array, Array]:
        """ln p by the memory, by both, and the similarity of the nearest candidate, (n,) float32."""
        size = max(1, _PART_NUMBERS // max(1, self.table.k))
        memory, mixed, nearest = [np.empty(0, np.float32)], [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for first in range(rows.start, rows.stop, size):
            part = self.table.part(slice(first, min(first + size, rows.stop)))
            memory_n, mixed_n = self.rule.logp(part, setting)
            if part.mixed_N is not None and (setting == self.opening or self.rule.kind == GIVEN):
                mixed_n = part.mixed_N  # as the evaluation computed it, to the last bit
            unknown_n = torch.isnan(part.lm_logp_N)
            memory.append(memory_n.masked_fill(unknown_n, torch.nan).numpy())
            mixed.append(mixed_n.masked_fill(unknown_n, torch.nan).numpy())
            best_n = torch.full_like(part.lm_logp_N, torch.nan)
            if part.found is not None:
                best_n = part.found.scores_NM.amax(1).masked_fill(~part.found.keep_NM.any(1), torch.nan)
            nearest.append(best_n.numpy())
        return np.concatenate(memory), np.concatenate(mixed), np.concatenate(nearest)

    def _frequency(self, token_n: Array) -> Array:
        """How often each token occurs in what the words were counted in; -1 where nobody knows."""
        if self._counts is None:
            counts = self.neighbors.words.counts()
            self._counts = np.empty(0, np.int64) if counts is None else counts
        known_n = (token_n >= 0) & (token_n < len(self._counts))
        found = np.full(len(token_n), -1, np.int64)
        found[known_n] = np.minimum(self._counts[token_n[known_n]], np.iinfo(np.int32).max)
        return found


def top_words(logp_V: torch.Tensor, also: Array) -> dict[str, Any]:
    """A distribution as the schema has it: its most probable tokens, and some others.

    Args:
        logp_V: ln p of every token.
        also: tokens whose ln p is wanted besides, such as those of the candidates.
    """
    best = logp_V.topk(min(SHOWN_WORDS, len(logp_V)))
    tokens = np.unique(np.concatenate([best.indices.cpu().numpy(), np.asarray(also, np.int64)]))
    tokens = tokens[(tokens >= 0) & (tokens < len(logp_V))]
    logp = logp_V.float().cpu().numpy()[tokens]
    order = np.argsort(-logp, kind="stable")
    return {
        "token": pack(tokens[order], "int32"),
        "logp": pack(logp[order], "float32"),
        "numbers": tokens.tolist(),
    }
