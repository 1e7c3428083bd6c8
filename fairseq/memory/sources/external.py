"""An external memory: the k nearest rows of a datastore."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq.memory import scoring
from fairseq.memory.datastore.chunked_array import as_tensor
from fairseq.memory.datastore.config import SAVES_TEXT
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.index.base import Index, check_k
from fairseq.memory.index.exact.row_scores import score_rows
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.lists.adc_search import AdcSearch
from fairseq.memory.index.sharded.opening import open_search
from fairseq.memory.index.sharded.ranges import SearchSettings
from fairseq.memory.sources.log_sums import RowSums
from fairseq.memory.types import Array, Candidates, Metric, Neighbors
from fairseq.registry import lookup

if TYPE_CHECKING:
    from fairseq.memory.sources.config import KnnConfig

logger = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 8192  # their candidates take 13 bytes x k each
See = Callable[[Tensor, Candidates], None]
_COPIED_BYTES = 256 << 20  # of a store's tokens

SCORES = ("recompute", "index", "dot")


class SearchOfOne(NamedTuple):
    """The parts of a look-up of one position."""

    search: AdcSearch
    value_R: Array
    """int64 token of each row."""
    dim: int
    """Width of a query."""


class ExternalMemory:
    """The k nearest rows of a datastore, as candidates. Look up many positions at once: a bulk is much faster.

    Source: arXiv 1911.00172, sec. 2.

    ```python
    memory = ExternalMemory.open("store", k=8)  # exact; name an index file to search that
    candidates = memory.lookup(query_ND)  # values, scores and mask, (N, 8)
    ```
    """

    def __init__(self, store: Datastore, index: Index, k: int, score: str = "recompute") -> None:
        """Args.

        store: an opened datastore.
        index: an index over its keys.
        k: neighbours per position.
        score: ``recompute`` computes the index's metric from the full keys, ``index`` takes the index's own scores
            (compressed keys), ``dot`` computes the inner product from the full keys.
        Raises: ValueError when index and store do not belong together or k is larger than the store.
        """
        lookup(dict.fromkeys(SCORES), score, "kind of score")
        if index.dim != store.dim:
            raise ValueError(
                f"the index is of width {index.dim}, datastore {store.prefix!r} of {store.dim}: it is of another "
                "store; rebuild it with build_dstore.py"
            )
        if len(index) != len(store):
            raise ValueError(
                f"the index holds {len(index)} rows, datastore {store.prefix!r} {len(store)}: the store grew or was "
                "saved again, or the build did not end; rebuild it with build_dstore.py"
            )
        if score != "index" and not store.has_keys:
            raise ValueError(f"datastore {store.prefix!r} was opened without its keys, {score!r} scores need them")
        check_k(k, store.num_alive)
        self.store, self.index, self.k, self.score = store, index, k, score
        self._one: SearchOfOne | None = None

    @classmethod
    def open(
        cls,
        store: str | Path | Datastore,
        index: str | Path | None = None,
        *,
        k: int = 1024,
        metric: str | Metric = Metric.L2,
        score: str = "recompute",
        probe: int = 8,
        search_on: str | None = None,
        search_workers: int | None = None,
    ) -> ExternalMemory:
        """Open a datastore and, if one is named, its index.

        Args:
            store: prefix of the datastore's files, or an opened store.
            index: name of the index file, with or without the metric as its ending; None searches the keys themselves,
                exactly.
            k: neighbours per position; at most the rows of the store are taken.
            metric: ``l2``, ``ip`` or ``cos``.
            score: see the class.
            probe: lists of the index that a search probes.
            search_on: ``ray`` or ``ray://HOST:PORT`` searches by Ray actors; None in this process.
            search_workers: number of actors; by default one for each shard or node.
        Raises: ValueError or OSError when something is missing, damaged or does not fit.
        """
        if not isinstance(store, Datastore):
            store = Datastore.open(store, StoreHints())
        metric = metric if isinstance(metric, Metric) else Metric.parse(metric)
        settings = SearchSettings(metric, probe)
        opened = open_search(store, settings, index, search_on=search_on, search_workers=search_workers)
        return cls(store, opened, min(k, store.num_alive), score)

    def lookup(self, query_ND: Tensor) -> Candidates:
        """Candidates for N positions, given their keys (N, D); on the device of the keys."""
        started = time.perf_counter()
        device = query_ND.device
        found = self.neighbors(query_ND)
        searched = time.perf_counter()
        candidates = self.candidates(found, device)
        ended = time.perf_counter()
        logger.info("%d lookups: %.2fs search, %.2fs values", len(query_ND), searched - started, ended - searched)
        return candidates

    def lookup_logp(
        self, query_ND: Tensor, target_N: Tensor, temperature: float, see: See | None = None
    ) -> tuple[Tensor, Tensor]:
        """Whether N positions have neighbours, and the log-probability that these give to the targets, on the CPU.

        It is ``scoring.knn_logp`` of :meth:`lookup`, to float32 rounding, without the neighbours and their tokens.

        Args:
            see: is given some of the positions, by their numbers, and their candidates, which are then made.
        """
        value_R, target_N = self.row_tokens, target_N.cpu()
        if value_R is None or see is not None:
            return self._logp_of_candidates(query_ND, target_N, temperature, see)
        collected = RowSums(value_R, target_N, temperature)
        index = self.index if self.score == "index" else None
        if not isinstance(index, FaissIndex) or not index.search_in_parts(query_ND, self.k, collected.take):
            for part in _parts(len(query_ND)):
                collected.add(part.start, self.neighbors(query_ND[part]))
        sums = collected.sums
        return sums.whole_N != -torch.inf, scoring.log_share(sums.hit_N, sums.whole_N)

    def _logp_of_candidates(
        self, query_ND: Tensor, target_N: Tensor, temperature: float, see: See | None
    ) -> tuple[Tensor, Tensor]:
        logp_N, found_N = torch.empty(len(query_ND)), torch.empty(len(query_ND), dtype=torch.bool)
        for part in _parts(len(query_ND)):
            found = self.candidates(self.neighbors(query_ND[part]))
            logp_N[part] = scoring.knn_logp(found, target_N[part], temperature)
            found_N[part] = found.keep_NM.any(1)
            if see is not None:
                see(torch.arange(part.start, part.start + len(found.keep_NM)), found)
        return found_N, logp_N

    @property
    def row_tokens(self) -> Array | None:
        """Tokens of all rows that the index may find, int64 or int32 (R,), as kernels take them.

        None if they would have to be copied and are too many for that, or the index has grown since.
        """
        return None if self._tokens is None or len(self._tokens) < len(self.index) else self._tokens

    @functools.cached_property
    def _tokens(self) -> Array | None:
        """Tokens of all rows, as kernels take them; None if they would have to be copied and are too many for that."""
        values = self.store.values
        in_place = len(values.chunks) == 1 and values.dtype in ("int64", "int32")
        if in_place:
            return as_tensor(values.chunks[0]).contiguous().numpy()
        return values.take(np.arange(len(values))).numpy() if 8 * len(values) <= _COPIED_BYTES else None

    def neighbors(self, query_ND: Tensor) -> Neighbors:
        """The k nearest rows of each query with their scores, on the CPU; the id is -1 where no row was found."""
        query_ND = query_ND.detach().float().cpu().contiguous()
        found = by_row_where_equal(self.index.search(query_ND, self.k))
        # Exact search has scored the full keys. Reading them again, for the same bits as the scores of an index, takes
        # about as long as the search where the keys are larger than memory.
        has_full_scores = self.score == "recompute" and self.index.streams_keys and self.store.keys.exceeds_ram
        if self.score == "index" or has_full_scores:
            return found
        return Neighbors(found.ids_NK, self._full_scores(query_ND, found.ids_NK))

    def search_of_one(self) -> SearchOfOne | None:
        """The look-up of a single position, where kernels can call it; None elsewhere."""
        if self.score != "index" or not isinstance(self.index, FaissIndex):
            return None
        search = self.index.search_of_one(self.k)
        if search is None:
            return None
        if self._one is None or self._one.search is not search:
            chunks = self.store.values.chunks
            if len(chunks) > 1 or isinstance(chunks[0], np.memmap):
                return None
            value_R = chunks[0] if self._tokens is None else self._tokens
            self._one = SearchOfOne(search, value_R.astype(np.int64, copy=False), self.index.dim)
        return self._one

    def candidates(self, found: Neighbors, device: torch.device | str = "cpu") -> Candidates:
        """Candidates of a search result: the rows' tokens, scores and mask, on ``device``."""
        # An id of -1 (the visited lists held fewer than k rows) must never be read as the last row.
        keep_NK = found.ids_NK >= 0
        if bool(keep_NK.all()):
            values_NK = self.store.values.take(found.ids_NK.reshape(-1)).view_as(found.ids_NK)
        else:
            values_NK = self.store.values.take(found.ids_NK.clamp_min(0).reshape(-1)).view_as(found.ids_NK)
            values_NK.masked_fill_(~keep_NK, -1)
        return Candidates(values_NK.to(device), found.scores_NK.to(device), keep_NK.to(device), found.ids_NK)

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query, as a search gives them, (N, M); -inf where the id is -1."""
        query_ND = query_ND.detach().float().cpu().contiguous()
        if self.score == "index":
            return self.index.score_rows(query_ND, ids_NM)
        return self._full_scores(query_ND, ids_NM)

    def _full_scores(self, query_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """Similarities from the full keys; -inf where the id is -1."""
        metric = Metric.IP if self.score == "dot" else self.index.metric
        return score_rows(self.store.keys, metric, query_ND, ids_NK)


def _parts(count: int) -> Iterator[slice]:
    """Positions that are looked up together."""
    yield from (slice(first, first + _QUERIES_AT_ONCE) for first in range(0, count, _QUERIES_AT_ONCE))


def by_row_where_equal(found: Neighbors) -> Neighbors:
    """The same neighbours, equally close ones by row.

    Compressed keys are often equal, and a search for fewer neighbours keeps those of the lower rows: in this order the
    first k of many are the ones that a search for k finds.
    """
    if found.equals_by_row:
        return found
    turned_NK = (found.ids_NK[:, 1:] < found.ids_NK[:, :-1]) & (found.ids_NK[:, 1:] >= 0)
    turned_NK &= found.scores_NK[:, 1:] == found.scores_NK[:, :-1]
    rows_Q = turned_NK.any(1).nonzero()[:, 0]
    if not len(rows_Q):
        return found
    ids_QK, scores_QK = found.ids_NK[rows_Q], found.scores_NK[rows_Q]
    by_row_QK = ids_QK.argsort(1)
    order_QK = by_row_QK.gather(1, scores_QK.gather(1, by_row_QK).argsort(dim=1, descending=True, stable=True))
    ids_NK, scores_NK = found.ids_NK.clone(), found.scores_NK.clone()
    ids_NK[rows_Q], scores_NK[rows_Q] = ids_QK.gather(1, order_QK), scores_QK.gather(1, order_QK)
    return Neighbors(ids_NK, scores_NK)


def open_store(config: KnnConfig, *, dim: int, saved_by: str = SAVES_TEXT) -> Datastore:
    """Open the datastore a config names: by its metadata, or a headerless one by width and size.

    Args:
        saved_by: command that makes such a store, for messages.
    Raises: ValueError when none is named or it cannot be opened.
    """
    prefix = config.dstore_filename
    if not prefix:
        raise ValueError("give --dstore-filename PREFIX: which datastore is searched is not known otherwise")
    with_keys = config.similarity != "index"
    stated_dim = dim if config.dstore_size is not None else None
    hints = StoreHints(stated_dim, config.dstore_size, config.dstore_fp16, config.dstore_bf16, saved_by)
    store = Datastore.open(prefix, hints, with_keys=with_keys)
    return store.in_memory() if config.move_dstore_to_mem else store


def open_external(
    config: KnnConfig,
    *,
    dim: int,
    score: str | None = None,
    key_tap: str | None = None,
    dictionary_digest: str | None = None,
    dictionary_size: int | None = None,
    model_digest: Callable[[], str] | None = None,
    saved_by: str = SAVES_TEXT,
) -> ExternalMemory:
    """Open store and index and check that they fit each other and the model, before any long work.

    Args:
        dim: width of the model's keys.
        score: as in ExternalMemory; by default what the config says.
        key_tap: where the model's keys come from.
        model_digest: digest of the model's file, made only for a store that records its own.
        saved_by: as in ``open_store``.
    Raises: ValueError or OSError with both values and the way out.
    """
    store = open_store(config, dim=dim, saved_by=saved_by).require(
        dim=dim,
        size=config.dstore_size,
        key_tap=key_tap,
        dictionary_digest=dictionary_digest,
        dictionary_size=dictionary_size,
        saved_by=saved_by,
    )
    check_model(store, model_digest, strict=config.strict_model)
    settings = SearchSettings(
        Metric.parse(config.faiss_metric_type),
        probe=config.probe,
        mapped=config.index_mmap,
        gpu=not config.use_faiss_cpu,
        memory_bytes=int(config.search_memory * 1e9),
    )
    index = open_search(
        store, settings, config.indexfile, search_on=config.search_on, search_workers=config.search_workers
    )
    memory = ExternalMemory(store, index, config.num_neighbors, score or config.similarity)
    logger.info("datastore %s: %d rows of width %d; index %s", store.prefix, len(store), store.dim, index)
    return memory


def check_model(store: Datastore, model_digest: Callable[[], str] | None, *, strict: bool) -> None:
    """Warn of a store that another model saved, or refuse it: its keys may lie elsewhere."""
    saved = store.metadata.get("model_digest")
    if saved is None or model_digest is None:
        return
    digest = model_digest()
    if saved == digest:
        return
    text = (
        f"datastore {store.prefix!r} was saved by another model (digest {saved[-12:]}) than this one (digest "
        f"{digest[-12:]}); its keys may lie elsewhere: save it again with this model"
    )
    if strict:
        raise ValueError(f"{text}, or drop --strict-model")
    logger.warning("%s (--strict-model makes this an error)", text)
