"""Clusters of a datastore's rows, by their keys: rows of one cluster share their pointers (RetoMaton).

Source: arXiv 2201.12431, sec. 3.2.

Shapes: R rows of the store, C clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_arrays
from fairseq.runtime.atomic_files import writing

_FORMAT = "fairseq-memory clusters"
_VERSION = 1
_ENDS_BYTES = 1 << 20
_REBUILD = "make them again with build_dstore.py --cluster_dstore"


@dataclass(frozen=True)
class Clusters:
    """Clusters of a store's rows."""

    cluster_R: Array
    """int32: the cluster of each row; -1 for a row of none."""
    first_C: Array
    """int64, one more than there are clusters: where in ``member_R`` each begins."""
    member_R: Array
    """int32, or int64 for large stores: the rows cluster by cluster, rising within each."""
    store: str = ""
    """Identity of the store (:func:`store_mark`); empty where the file has none."""
    signature: str = ""
    """What they were made with; empty where the file does not say."""

    def __len__(self) -> int:
        return len(self.first_C) - 1

    @property
    def num_rows(self) -> int:
        """Rows of the store."""
        return len(self.cluster_R)

    def of(self, number: int) -> Array:
        """The rows of one cluster."""
        return self.member_R[self.first_C[number] : self.first_C[number + 1]]

    @classmethod
    def of_assignment(cls, cluster_R: Array, num_clusters: int, store: str = "") -> Clusters:
        """From the cluster of each row, -1 for none."""
        dtype = np.int32 if len(cluster_R) <= np.iinfo(np.int32).max else np.int64
        order_R = np.argsort(cluster_R, kind="stable").astype(dtype)
        first_C = np.searchsorted(cluster_R, np.arange(num_clusters + 1), sorter=order_R)
        member_R = order_R[first_C[0] :]
        return cls(cluster_R.astype(np.int32), (first_C - first_C[0]).astype(np.int64), member_R, store)

    @classmethod
    def of_members(cls, members: Sequence[Array], num_rows: int, store: str = "") -> Clusters:
        """From the rows of each cluster. Raises: ValueError for a row that does not exist or is in two clusters."""
        sizes = np.array([len(rows) for rows in members])
        flat = np.concatenate([np.asarray(rows, np.int64).reshape(-1) for rows in members])
        if len(flat) and (flat.min() < 0 or flat.max() >= num_rows):
            wrong = flat.min() if flat.min() < 0 else flat.max()
            raise ValueError(
                f"the clusters name row {wrong} of a datastore of {num_rows} rows: they are of another store"
            )
        if len(np.unique(flat)) != len(flat):
            raise ValueError("a row is in more than one cluster, or twice in one")
        cluster_R = np.full(num_rows, -1, np.int32)
        cluster_R[flat] = np.repeat(np.arange(len(members)), sizes)
        return cls.of_assignment(cluster_R, len(members), store)

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Write a ``.npz`` file that appears whole or not at all; ``about`` adds further arrays or numbers."""
        with writing(path, binary=True) as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                version=np.array(_VERSION),
                store=np.array(self.store),
                cluster=self.cluster_R,
                first=self.first_C,
                members=self.member_R,
                **(about or {}),
            )

    @classmethod
    def open(cls, path: str | Path, store: Datastore) -> Clusters:
        """Read clusters of a store. Raises: ValueError when they are missing, damaged or of another store."""
        clusters = cls.read(path)
        if clusters.num_rows != len(store):
            raise ValueError(
                f"{path} holds clusters of {clusters.num_rows} rows, datastore {store.prefix!r} has {len(store)}: they "
                f"are of another store; {_REBUILD}"
            )
        if clusters.store and clusters.store != store_mark(store):
            raise ValueError(
                f"{path} holds clusters of other rows than datastore {store.prefix!r} holds now; {_REBUILD}"
            )
        return clusters

    @classmethod
    def read(cls, path: str | Path) -> Clusters:
        """Read what :meth:`save` wrote. Raises: ValueError when it is missing, damaged or something else."""
        fix = f"copy it again, or {_REBUILD}"
        try:
            held = read_arrays(path, "is no whole file of clusters", fix)
        except FileNotFoundError:
            raise ValueError(f"no clusters at {str(path)!r}; {_REBUILD}") from None
        if str(held.get("format")) != _FORMAT or str(held.get("version")) != str(_VERSION):
            raise ValueError(f"{path} is of another program or release, or damaged; {fix}")
        missing = {"cluster", "first", "members", "store"} - held.keys()
        if missing:
            raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; {fix}")
        texts = (str(held[name]) if name in held else "" for name in ("store", "signature"))
        clusters = cls(held["cluster"], held["first"], held["members"], *texts)
        if not clusters._fit_together():
            raise ValueError(f"{path} is damaged: its arrays contradict each other; copy it again, or {_REBUILD}")
        return clusters

    def _fit_together(self) -> bool:
        """True if every number points into the arrays: compiled loops read them unchecked."""
        cluster_R, first_C, member_R = self.cluster_R, self.first_C, self.member_R
        kinds = [cluster_R.dtype == np.int32, first_C.dtype == np.int64, member_R.dtype in (np.int32, np.int64)]
        if not all(kinds) or {cluster_R.ndim, first_C.ndim, member_R.ndim} != {1} or not len(first_C):
            return False
        rising = bool((np.diff(first_C) >= 0).all()) and first_C[0] == 0 and first_C[-1] == len(member_R)
        if not rising or (len(member_R) and not 0 <= member_R.min() <= member_R.max() < len(cluster_R)):
            return False
        told_R = np.full(len(cluster_R), -1, np.int32)
        told_R[member_R] = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(first_C))
        return bool((told_R == cluster_R).all())


def store_mark(store: Datastore) -> str:
    """Identity of the rows of a store: its digest; without one, its size and both ends of its values."""
    if store.digest is not None:
        return store.digest
    count = _ENDS_BYTES // 8
    ends = [store.values.block(0, count).long(), store.values.block(max(0, len(store) - count), len(store)).long()]
    content = b"".join(end.numpy().tobytes() for end in ends)
    return hashlib.sha256(f"{len(store)} {store.dim} ".encode() + content).hexdigest()
