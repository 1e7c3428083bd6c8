"""Recall of neighbours: how many hold the token that they are for, and whether any does.

Shapes: T tokens, K neighbours of a token, P numbers of neighbours at which recall is measured.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.gnn.neighbors import SplitNeighbors, search_split, shard_counts
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.memory.gnn.recall.config import SEARCHED, RecallConfig

logger = logging.getLogger(__name__)

_NUMBERS = 1 << 20  # neighbours that are compared at a time
_ROWS = 1 << 22  # values that are read at a time


@dataclass(frozen=True)
class RecallAt:
    """Recall of the first k neighbours."""

    k: int
    share: float
    """Neighbours that hold the token, of those that were found."""
    count: float
    """Neighbours that hold the token, per token."""
    any: float
    """Tokens that one neighbour at least holds, of all tokens."""


@dataclass(frozen=True)
class RecallCurve:
    """Recall of a store's neighbours of a split."""

    folder: str
    split: str
    key_tap: str | None
    """State that the keys are, as the store says."""
    num_tokens: int
    made_of: dict[str, Any]
    """What decided the neighbours."""
    points: tuple[RecallAt, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return vars(self) | {"points": [dict(vars(point)) for point in self.points]}


def doubling(k: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and ``k`` itself."""
    return (*(1 << power for power in range(k.bit_length()) if 1 << power < k), k)


def recall_of(
    neighbors: SplitNeighbors, train: Datastore, queries: Datastore, ks: Sequence[int]
) -> tuple[RecallAt, ...]:
    """Recall at each of some numbers of neighbours, by comparing values of both stores.

    Counts are what the original prints as recall (``--output-knn-recall``): neighbours that hold the token, per token.

    Args:
        neighbors: of every row of ``queries`` in ``train``; missing ones hold no token.
    """
    last_P = torch.tensor(ks) - 1
    hits_P, any_P, found_P = (torch.zeros(len(ks), dtype=torch.int64) for _ in range(3))
    step = max(1, _NUMBERS // max(ks))
    for start in range(0, len(queries), step):
        token_T = torch.arange(start, min(start + step, len(queries)))
        neighbor_TK = neighbors.take(token_T, max(ks))
        keep_TK = neighbor_TK >= 0
        value_TK = train.values.take(neighbor_TK.clamp(min=0).flatten()).view_as(neighbor_TK)
        holds_TK = (value_TK == queries.values.take(token_T)[:, None]) & keep_TK
        hits_TP = holds_TK.cumsum(1)[:, last_P]
        hits_P += hits_TP.sum(0)
        any_P += (hits_TP > 0).sum(0)
        found_P += keep_TK.cumsum(1)[:, last_P].sum(0)
    return tuple(
        RecallAt(k, hits / max(1, found), hits / len(queries), some / len(queries))
        for k, hits, some, found in zip(ks, hits_P.tolist(), any_P.tolist(), found_P.tolist())
    )


def measure_recall(
    config: RecallConfig, report: Callable[[int, int], object] = lambda done, total: None
) -> list[RecallCurve]:
    """Recall of every folder's neighbours of every split; neighbours that are not there are searched and kept.

    Args:
        report: is given the tokens done and those there are, of each search.
    Raises: ValueError before any search when stores are not of one text, or kept neighbours of another store, metric
        or band, or too few.
    """
    pairs = [_Pair.open(config, folder, split) for split in config.splits for folder in config.folders]
    for split in config.splits:
        _require_one_text([pair for pair in pairs if pair.split == split])
    opened = [pair.neighbors(config) or pair.searched(config, report) for pair in pairs]
    ks = doubling(config.num_neighbors or min(neighbors.k for neighbors in opened))
    curves = [pair.curve(neighbors, ks) for pair, neighbors in zip(pairs, opened)]
    _warn_of_differences(curves)
    return curves


@dataclass(frozen=True)
class _Pair:
    """A folder's stores of train and of a split."""

    folder: str
    split: str
    train: Datastore
    queries: Datastore

    @classmethod
    def open(cls, config: RecallConfig, folder: str, split: str) -> _Pair:
        train, queries = (Datastore.open(str(Path(folder, name))) for name in (config.train, split))
        pair = cls(folder, split, train, queries)
        pair.neighbors(config)  # before any search, if they are there
        return pair

    @property
    def path(self) -> str:
        return f"{self.queries.prefix}.neighbors"

    def neighbors(self, config: RecallConfig) -> SplitNeighbors | None:
        """Kept neighbours; None where a search makes them, or resumes."""
        path = Path(self.path)
        if not Path(f"{path}.json").exists() and not shard_counts(path):
            return None
        kept = SplitNeighbors.open(path, train=self.train, num_tokens=len(self.queries))
        kept.require_split(self.queries)
        kept.require(config.num_neighbors or 1)
        asked = {"metric": config.faiss_metric_type, "band": config.band}
        for name, flag in (("metric", "--faiss-metric-type"), ("band", "--invalid-neighbor-context")):
            there = kept.made_of.get(name, asked[name])  # only neighbours in the split itself have a band
            if asked[name] not in (None, there):
                raise ValueError(
                    f"{path} keeps neighbours of {name} {there}, {flag} {asked[name]} asks for others; leave the flag "
                    "out, or remove the file to search again"
                )
        return kept

    def searched(self, config: RecallConfig, report: Callable[[int, int], object]) -> SplitNeighbors:
        given: dict[str, Any] = {"faiss_metric_type": config.faiss_metric_type, "band": config.band}
        wanted = NeighborsConfig(
            queries=self.queries.prefix,
            dstore_filename=self.train.prefix,
            num_neighbors=config.num_neighbors or min(SEARCHED, len(self.train)),
            search_memory=config.search_memory,
            **{name: value for name, value in given.items() if value is not None},
        )
        search_split(wanted, report)
        return SplitNeighbors.open(self.path, train=self.train, num_tokens=len(self.queries))

    def curve(self, neighbors: SplitNeighbors, ks: Sequence[int]) -> RecallCurve:
        points = recall_of(neighbors, self.train, self.queries, ks)
        tap = self.queries.metadata.get("key_tap")
        return RecallCurve(self.folder, self.split, tap, len(self.queries), dict(neighbors.made_of), points)


def _require_one_text(pairs: Sequence[_Pair]) -> None:
    """Raise ValueError unless all stores of a split hold the same tokens, and so do their train splits."""
    for name in ("queries", "train"):
        stores: list[Datastore] = [getattr(pair, name) for pair in pairs]
        first = _tokens(stores[0])
        for store in stores[1:]:
            other = _tokens(store)
            if other != first:
                raise ValueError(
                    f"datastore {store.prefix!r} ({other}) and {stores[0].prefix!r} ({first}) hold other tokens, and "
                    "the recall of one text is compared; save both from one split"
                )


def _tokens(store: Datastore) -> str:
    """The tokens of a store, as a number of them and a checksum."""
    sum = 0
    for start in range(0, len(store), _ROWS):
        sum = zlib.crc32(np.asarray(store.values.block(start, start + _ROWS), np.int64).tobytes(), sum)
    return f"{len(store)} rows, crc {sum:08x}"


def _warn_of_differences(curves: Sequence[RecallCurve]) -> None:
    """Warn of neighbours of a split that were not searched alike."""
    for name in ("metric", "index", "band", "own_document", "replaced"):
        for curve in curves:
            first = next(other for other in curves if other.split == curve.split)
            one, other = first.made_of.get(name), curve.made_of.get(name)
            if one != other:
                logger.warning(
                    "%s: neighbours of %s were searched with %s %s, those of %s with %s: their recall differs by that "
                    "too",
                    curve.split, first.folder, name, one, curve.folder, other,
                )  # fmt: skip
