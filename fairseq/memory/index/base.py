"""The interface of indexes, and checks that all of them make. Shapes: N queries, M rows, D width."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fairseq.memory.types import Array, Metric, Neighbors


class Index(Protocol):
    """A searchable set of keys, numbered as in the datastore it was made of."""

    @property
    def metric(self) -> Metric:
        """The measure of closeness."""
        ...

    @property
    def dim(self) -> int:
        """Width of the keys."""
        ...

    @property
    def deleted(self) -> Array:
        """int64, ascending: rows that are never found."""
        ...

    @property
    def streams_keys(self) -> bool:
        """A search is one pass over all keys, however many queries it answers."""
        ...

    def __len__(self) -> int: ...

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query, best first. Raises: ValueError if k is larger than the index."""
        ...

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query as a search gives them, float32 (N, M); -inf where the id is -1."""
        ...

    def bulk_pays(self, num_queries: int) -> bool:
        """True if this many queries cost less in one search than one by one."""
        ...


def check_k(k: int, size: int) -> None:
    """Raise ValueError unless 1 <= k <= size."""
    if k < 1:
        raise ValueError(f"--k must be at least 1, got {k}")
    if k > size:
        raise ValueError(f"--k {k} is larger than the datastore, which has {size} rows; give at most {size}")


def check_queries(query_ND: Tensor, dim: int) -> None:
    """Raise ValueError unless the queries are rows of the index's width."""
    if query_ND.ndim != 2 or query_ND.shape[1] != dim:
        raise ValueError(f"queries of shape {tuple(query_ND.shape)} do not fit an index of width {dim}")
