"""Clusters of knn-transformers: pickles, read by an unpickler that makes arrays and containers and nothing else.

Such a file holds, for each cluster, the rows of the datastore in it: as a SciPy ``csr_matrix`` with ones at (cluster,
row), or as arrays. SciPy is not needed: a matrix is read as the three arrays it consists of.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.types import Array

_NAME = re.compile(r"members_(.+)_(\d+)_(\d+)_(\d+)_(\d+)\.pkl")
_MODEL_NAME = re.compile(r"(?:dstore|index)_(.+)_(\d+)_(\d+)(?:_keys\.npy|_vals\.npy|\.indexed)?")


def _latin_bytes(text: str, encoding: str) -> bytes:
    """Function by which old pickles make bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


class _CsrMatrix:
    """The state of a ``scipy.sparse.csr_matrix``; no code of SciPy runs."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a csr_matrix without its arrays")
        self.state: dict[str, Any] = state

    def lists(self) -> list[Array]:
        """Columns that are not zero, row by row. Raises: ValueError when the arrays do not make a matrix."""
        state = getattr(self, "state", {})
        start, column, value = (np.asarray(state.get(name)) for name in ("indptr", "indices", "data"))
        numeric = all(x.ndim == 1 and np.issubdtype(x.dtype, np.number) for x in (start, column, value))
        whole = numeric and all(np.issubdtype(x.dtype, np.integer) for x in (start, column))
        if not whole or len(start) < 2 or len(column) != len(value):
            raise ValueError("its csr_matrix lacks one of indptr, indices and data, or they are not of one length")
        if start[0] != 0 or start[-1] != len(column) or bool((np.diff(start) < 0).any()):
            raise ValueError("indptr of its csr_matrix does not divide indices into rows")
        parts = zip(start[:-1].tolist(), start[1:].tolist())
        return [np.sort(column[first:stop][value[first:stop] != 0]) for first, stop in parts]


def _reconstruct(kind: type, base: type, state: object) -> _CsrMatrix:
    """Function by which old pickle protocols make objects; here of one class alone."""
    if kind is not _CsrMatrix or base is not object or state is not None:
        raise pickle.UnpicklingError(f"it makes an object of {kind!r}")
    return _CsrMatrix()


def _admitted() -> dict[tuple[str, str], Any]:
    # What arrays say they are made by: releases of numpy have these functions in different places.
    array, number = np.zeros(1), np.int64(0)
    makers: dict[str, Any] = {
        "multiarray._reconstruct": array.__reduce__()[0],
        "multiarray.scalar": number.__reduce__()[0],
        "numeric._frombuffer": array.__reduce_ex__(5)[0],
    }
    found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in ("numpy.core", "numpy._core"):
        for name, maker in makers.items():
            module, _, function = name.partition(".")
            found[f"{core}.{module}", function] = maker
    for builtins in ("builtins", "__builtin__"):
        for kind in (set, frozenset, list, tuple, dict, bytes, bytearray):
            found[builtins, kind.__name__] = kind
        found[builtins, "object"] = object
    found["_codecs", "encode"] = _latin_bytes
    for module in ("scipy.sparse.csr", "scipy.sparse._csr"):  # before and since SciPy 1.8
        found[module, "csr_matrix"] = _CsrMatrix
    for module in ("copyreg", "copy_reg"):
        found[module, "_reconstructor"] = _reconstruct
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what arrays and containers are made of."""
        try:
            return _admitted()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no clusters are made of") from None


def read_members(path: str | Path, store: Datastore) -> Clusters:
    """Read a ``members_*.pkl``. Raises: ValueError when it is missing, damaged, of another store, or names a class."""
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if match and (int(match[2]), int(match[3])) != (len(store), store.dim):
        raise ValueError(
            f"{path} is by its name of a store of {match[2]} rows of width {match[3]}; datastore {store.prefix!r} has "
            f"{len(store)} of {store.dim}"
        )
    try:
        held = _Unpickler(io.BytesIO(path.read_bytes())).load()
        members = _lists(held)
    except FileNotFoundError:
        raise ValueError(f"no clusters at {str(path)!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # what damaged bytes make an unpickler do has no bounds
        raise ValueError(f"{path} is no pickle of arrays ({type(error).__name__}: {error})") from None
    try:
        return Clusters.of_members(members, len(store))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _lists(held: Any) -> list[Array]:
    """The rows of each cluster, from any of the containers they come in."""
    if isinstance(held, _CsrMatrix):
        held = held.lists()
    if isinstance(held, Mapping):
        held = [held[key] for key in sorted(held)]
    if isinstance(held, np.ndarray) and held.ndim == 2 and held.dtype != object:
        held = [row[row >= 0] for row in held]  # of one length, the shorter ones filled up with -1
    if not isinstance(held, (list, tuple, np.ndarray)) or not len(held):
        raise ValueError(f"it holds a {type(held).__name__}, not the rows of each cluster")
    return [_rows(cluster) for cluster in held]


def _rows(cluster: Any) -> Array:
    if isinstance(cluster, (set, frozenset)):
        cluster = sorted(cluster)
    rows = np.asarray(cluster)
    if not rows.size:
        return np.empty(0, np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"a cluster is an array of {rows.dtype} {rows.shape}, not a list of row numbers")
    return rows.astype(np.int64)


def open_clusters(path: str | Path, store: Datastore) -> Clusters:
    """Open a file of clusters, ours or of knn-transformers. Raises: ValueError as both."""
    return read_members(path, store) if Path(path).suffix == ".pkl" else Clusters.open(path, store)


@dataclass(frozen=True)
class OriginalFiles:
    """The store, index and clusters of knn-transformers that one folder holds for a model."""

    prefix: Path
    """Prefix of the store's names."""
    model: str
    rows: int
    dim: int
    index: Path | None
    members: Path | None

    @classmethod
    def find(cls, folder: str | Path, model: str | None = None) -> OriginalFiles:
        """By their names: ``dstore_MODEL_ROWS_WIDTH_vals.npy``, ``index_...indexed`` and ``members_...pkl``.

        Args:
            model: the MODEL of the names, needed where the folder holds stores of several.
        Raises: ValueError when there is none, or more than one to choose from.
        """
        folder = Path(folder)
        names = sorted(path.name for path in folder.glob("dstore_*_vals.npy"))
        found = [(name, match) for name in names if (match := _MODEL_NAME.fullmatch(name))]
        found = [(name, match) for name, match in found if model in (None, match[1])]
        if len(found) != 1:
            listed = ", ".join(name for name, _ in found) or "none"
            wanted = f" of model {model}" if model else ""
            raise ValueError(f"{str(folder)!r} holds {listed} as a store{wanted}; name one store's MODEL of the names")
        name, match = found[0]
        mark = f"{match[1]}_{match[2]}_{match[3]}"
        index = folder / f"index_{mark}.indexed"
        members = sorted(folder.glob(f"members_{mark}_*.pkl"))
        if len(members) > 1:
            listed = ", ".join(path.name for path in members)
            raise ValueError(f"{str(folder)!r} holds several files of clusters: {listed}; name one of them")
        return cls(
            folder / name.removesuffix("_vals.npy"),
            *(match[1], int(match[2]), int(match[3])),
            index if index.is_file() else None,
            members[0] if members else None,
        )
