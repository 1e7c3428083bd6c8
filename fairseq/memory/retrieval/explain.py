"""Tokens that a memory helped and harmed most, with the neighbours that did it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.retrieval.file import Retrieval, store_digest
from fairseq.memory.retrieval.schema import EXPLAINED_ABOUT, EXPLAINED_MADE_OF
from fairseq.memory.retrieval.sweep import Grid, Setting, opinions
from fairseq.memory.types import Array
from fairseq.runtime.records import require

BEFORE, AFTER = 12, 3
"""Tokens of context that are shown."""
SHOWN_NEIGHBORS = 4


@dataclass(frozen=True)
class Neighbor:
    """One neighbour of a token."""

    row: int
    """Its row in the datastore."""
    share: float
    """Its part of the memory's own distribution."""
    is_hit: bool
    """True if it holds the target."""
    text: str
    """Its token in brackets, in the text around it."""


@dataclass(frozen=True)
class Change:
    """A scored token and what the memory made of it."""

    text: str
    """The token in brackets, in the text around it."""
    block: int
    logp_before: float
    """ln p of the language model alone."""
    logp_after: float
    memory_logp: float
    """ln p that the memory's own distribution gives."""
    neighbors: tuple[Neighbor, ...]
    """Those with the largest shares."""

    @property
    def gain(self) -> float:
        """By how much ln p rose."""
        return self.logp_after - self.logp_before

    def to_dict(self) -> dict[str, Any]:
        """As plain types; minus infinity as None."""
        record: dict[str, Any] = {"text": self.text, "block": self.block}
        for name in ("logp_before", "logp_after", "memory_logp", "gain"):
            value = getattr(self, name)
            record[name] = value if np.isfinite(value) else None
        return record | {"neighbors": [dict(vars(neighbor)) for neighbor in self.neighbors]}


def open_store(retrieval: Retrieval, prefix: str | None) -> Datastore:
    """The datastore the neighbours are rows of; by default where it lay. Its keys are not needed.

    Raises: ValueError when it is not there or is another one.
    """
    require(retrieval.fingerprint, EXPLAINED_MADE_OF, f"{retrieval.path}: its made_of")
    require(retrieval.about, EXPLAINED_ABOUT, f"{retrieval.path}: its about")
    saved, place = retrieval.fingerprint, retrieval.about["store"]
    try:
        hints = StoreHints(dim=saved["dim"], size=None if place["described"] else saved["store_rows"])
        store = Datastore.open(prefix or place["prefix"], hints, with_keys=False)
    except ValueError as error:
        raise ValueError(
            f"--explain shows neighbours in the datastore's text: {error}; or name it by --dstore-filename"
        ) from None
    digest = store_digest(store)
    if digest != saved["store_digest"]:
        raise ValueError(
            f"datastore {store.prefix!r} is not the one {retrieval.path} was retrieved from (its content is "
            f"{digest[:20]}, that of the other {saved['store_digest'][:20]}); name that one by --dstore-filename"
        )
    return store


def explain(
    retrievals: Sequence[Retrieval], setting: Setting, count: int, store: Datastore, dictionary: Dictionary
) -> tuple[list[Change], list[Change]]:
    """The ``count`` tokens whose ln p rose most by a setting, and those whose fell most, most first."""
    changes = []
    for retrieval in retrievals:
        temperature = _own_temperature(retrieval, setting)
        grid = Grid((setting.k,), (), (temperature,), (setting.joint_temperature,))
        said = opinions(retrieval, grid)
        after_N = said.mixed(setting).double().numpy()
        before_N = np.asarray(retrieval.arrays["lm_logp"], np.float64)
        gain_N = np.nan_to_num(after_N - before_N, nan=0.0)
        falling = np.argsort(-gain_N, kind="stable")
        chosen = np.unique(np.concatenate([falling[:count], falling[::-1][:count]]))
        memory_N = said.memory[setting.k, temperature].double().numpy()
        shown = zip(_in_text(retrieval, chosen, dictionary), _neighbors(retrieval, chosen, setting, store, dictionary))
        for row, (text, neighbors) in zip(chosen.tolist(), shown):
            before, after, memory = (float(values[row]) for values in (before_N, after_N, memory_N))
            changes.append(Change(text, int(retrieval.arrays["block"][row]), before, after, memory, neighbors))
    changes.sort(key=lambda change: -change.gain)
    gained = [change for change in changes[:count] if change.gain > 0]
    return gained, [change for change in changes[::-1][:count] if change.gain < 0]


def _own_temperature(retrieval: Retrieval, setting: Setting) -> float:
    """What divides the similarities in the memory's own distribution."""
    if setting.weight is not None:
        return setting.temperature
    return setting.temperature * math.sqrt(retrieval.fingerprint["dim"])  # as in the joint normalisation


def _in_text(retrieval: Retrieval, rows: Array, dictionary: Dictionary) -> Iterator[str]:
    """Some scored tokens in the scored text around them; dropped blocks break it."""
    order = retrieval.order
    target_N, block_N = (np.asarray(retrieval.arrays[name])[order] for name in ("target", "block"))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    for place in places[rows].tolist():
        first, after = max(0, place - BEFORE), place + AFTER + 1
        # Of the text itself only what joins without a gap: the numbers of blocks that follow each other do.
        jumps = np.flatnonzero(np.diff(block_N[first:after]) > 1) + first + 1
        first = max([first, *jumps[jumps <= place].tolist()])
        after = min([after, *jumps[jumps > place].tolist()])
        yield _shown(target_N[first:after].tolist(), place - first, dictionary)


def _neighbors(
    retrieval: Retrieval, rows: Array, setting: Setting, store: Datastore, dictionary: Dictionary
) -> Iterator[tuple[Neighbor, ...]]:
    for row in rows.tolist():
        scores_K = torch.from_numpy(np.array(retrieval.arrays["scores"][row, : setting.k]))
        share_K = torch.softmax(scores_K / _own_temperature(retrieval, setting), 0).nan_to_num(0.0)
        best = share_K.argsort(descending=True, stable=True)[:SHOWN_NEIGHBORS].numpy()
        ids = np.asarray(retrieval.arrays["ids"][row])[best].astype(np.int64)
        values = np.asarray(retrieval.arrays["values"][row])[best]
        hits = values == retrieval.arrays["target"][row]
        texts = store.context(ids, before=BEFORE, after=AFTER).numpy()
        yield tuple(
            Neighbor(int(i), float(share_K[place]), bool(hit), _around(text, int(value), dictionary))
            for i, place, hit, text, value in zip(ids, best.tolist(), hits, texts, values)
            if i >= 0
        )


def _around(token_C: Array, value: int, dictionary: Dictionary) -> str:
    """A row's token (which stays when the row is deleted by now) and what the store has around it."""
    tokens = token_C.copy()
    tokens[BEFORE] = value
    present = tokens >= 0
    first = BEFORE - int(np.argmin(present[: BEFORE + 1][::-1])) + 1 if not present[:BEFORE].all() else 0
    after = BEFORE + int(np.argmin(present[BEFORE:])) if not present[BEFORE:].all() else len(tokens)
    return _shown(tokens[first:after].tolist(), BEFORE - first, dictionary)


def _shown(tokens: list[int], place: int, dictionary: Dictionary) -> str:
    words = [dictionary[token] for token in tokens]
    words[place] = f"[{words[place]}]"
    return " ".join(words)
