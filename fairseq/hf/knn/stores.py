"""Stores and indexes by the names knn-transformers gives them, or by any prefix; checked against the model.

A folder holds ``dstore_<model type>_<rows>_<width>_keys.npy`` and ``..._vals.npy`` with ``index_<the same>.indexed``.
Our own stores carry their sizes in their metadata: ``dstore_<model type>_<width>`` is name enough, or any other.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fairseq.hf.hooks.identity import model_digest, model_type, tokenizer_digest, vocabulary_size
from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.hf.hooks.taps import Tap
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.layout import StoreFiles, StoreName
from fairseq.memory.index.base import Index
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.opening import open_faiss
from fairseq.memory.index.sharded.opening import open_sharded_index
from fairseq.memory.index.sharded.ranges import SearchSettings
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Array, Metric

logger = logging.getLogger(__name__)

_NAME = r"dstore_(?P<model>{model})(?:_(?P<rows>\d+))?_(?P<dim>\d+)"
DEFAULT_K = 1024
_ENDINGS = {".indexed": Metric.L2, ".l2": Metric.L2, ".ip": Metric.IP, ".cos": Metric.COS}


def store_prefix(folder: str | Path, model: str, rows: int | None, dim: int) -> str:
    """The prefix of a store's files: knn-transformers' where the number of rows is known in advance."""
    sizes = f"{dim}" if rows is None else f"{rows}_{dim}"
    return str(Path(folder) / f"dstore_{model}_{sizes}")


@dataclass(frozen=True)
class StorePlace:
    """A store and its index, found by name."""

    prefix: str
    rows: int | None
    """From the name; None for stores that describe themselves."""
    dim: int | None
    index: Path | None

    @classmethod
    def find(cls, where: str | Path, model: str, rows: int | None = None, dim: int | None = None) -> StorePlace:
        """The store a user means.

        Args:
            where: its folder, or the prefix of its files.
            model: type of the model; other models' stores in the folder are passed over.
            rows: if stated, stores of another number in their names are skipped; so for ``dim``.
        Raises: ValueError when there is none or more than one.
        """
        if _is_store(str(where)):
            return cls._of(str(where), model)
        if not Path(where).is_dir():
            raise ValueError(
                f"no datastore at {str(where)!r}: it is neither a folder nor the prefix of a store's files; KNNSaver "
                "saves one"
            )
        found = [cls._of(prefix, model) for prefix in _prefixes(Path(where))]
        fitting = [place for place in found if place._fits(model, rows, dim)]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(Path(place.prefix).name for place in fitting or found)
        if fitting:
            raise ValueError(f"{str(where)!r} holds several stores: {names}; append the name of one to dstore_dir")
        sizes = f"{'' if rows is None else f' of {rows} rows'}{'' if dim is None else f' of width {dim}'}"
        raise ValueError(
            f"{str(where)!r} holds no datastore of a {model} model{sizes}; it has: {names or 'none'}. KNNSaver saves "
            "one; a store of another name is opened by dstore_dir=FOLDER/NAME"
        )

    @classmethod
    def _of(cls, prefix: str, model: str) -> StorePlace:
        sizes_in_name = _sizes_in(prefix, model)
        if sizes_in_name is None or StoreFiles.of(prefix).metadata.exists():
            return cls(prefix, None, None, find_index(prefix))
        rows = int(sizes_in_name["rows"]) if sizes_in_name["rows"] else None
        return cls(prefix, rows, int(sizes_in_name["dim"]), find_index(prefix))

    def _fits(self, model: str, rows: int | None, dim: int | None) -> bool:
        sizes_in_name = _sizes_in(self.prefix, model)
        if sizes_in_name is None:
            return True
        sizes = ((rows, sizes_in_name["rows"]), (dim, sizes_in_name["dim"]))
        return sizes_in_name["model"] == model and all(not (want and has) or want == int(has) for want, has in sizes)


def _sizes_in(prefix: str, model: str) -> re.Match[str] | None:
    """Model, rows and width from the name of a store; None for a name without them.

    A type of model may end in a number itself (m2m_100), so a name that begins with the type at hand is of that type.
    """
    name = Path(prefix).name
    return re.fullmatch(_NAME.format(model=re.escape(model)), name) or re.fullmatch(_NAME.format(model=".+?"), name)


def index_name(prefix: str | Path) -> str:
    """Name of the index over a store, without its ending."""
    path = Path(prefix)
    stem = "index_" + path.name.removeprefix("dstore_") if path.name.startswith("dstore_") else path.name + ".index"
    return str(path.with_name(stem))


def find_index(prefix: str | Path) -> Path | None:
    """The index file of a store, if there is one."""
    paths = (Path(index_name(prefix) + ending) for ending in _ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def index_metric(path: Path) -> Metric:
    """The metric of an index, by the ending of its file."""
    return _ENDINGS[path.suffix]


def find_members(prefix: str | Path) -> Path | None:
    """The file of clusters beside a store, ours or of knn-transformers. Raises: ValueError when there are several."""
    path = Path(prefix)
    ours = StoreName.of(prefix).existing_side_file("clusters.npz")
    found = [ours] if ours.is_file() else []
    if not found and path.name.startswith("dstore_"):
        found = sorted(path.parent.glob(f"members_{path.name.removeprefix('dstore_')}_*.pkl"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ValueError(f"{str(path.parent)!r} holds several files of clusters: {names}; pass one of them as members=")
    return found[0] if found else None


@dataclass(frozen=True)
class MemorySettings:
    """Options for searching a store."""

    k: int | None = None
    """Neighbours per position; None for 1024, or all rows of a smaller store."""
    probe: int = 32
    score: str | None = None
    """``recompute``, ``index`` or ``dot`` as in ExternalMemory; by default the index's scores where there is one."""
    load_keys: bool = True
    """The full keys may be read."""
    in_memory: bool = False
    """Read the store into RAM first."""
    search_on: str | None = None
    """``ray`` or ``ray://HOST:PORT``: search by Ray actors."""
    search_workers: int | None = None
    """Number of these; None for one a shard or a node."""


def open_memory(place: StorePlace, settings: MemorySettings) -> ExternalMemory:
    """Open store and index. Raises: ValueError when they do not fit each other or the settings."""
    score = settings.score or ("index" if place.index else "recompute")
    needs_keys = score != "index"
    if needs_keys and not settings.load_keys:
        missing = f"there is no index beside {place.prefix!r}" if not place.index else f"{score} scores were asked for"
        raise ValueError(f"no_load_keys forbids the full keys, and they are needed: {missing}; drop it")
    store = open_store(place, with_keys=needs_keys)
    # Values are read at random, a thousand for each query: from memory that takes a fraction of the time.
    store = store.in_memory() if settings.in_memory else replace(store, values=store.values.in_memory())
    if settings.search_on is not None:
        metric = index_metric(place.index) if place.index else Metric.L2
        search = SearchSettings(metric, settings.probe, gpu=False)
        indexfile = str(place.index) if place.index else None
        index: Index = open_sharded_index(store, settings.search_on, search, indexfile, settings.search_workers)
    elif place.index is None:
        logger.info("no index beside %s: all %d keys are compared with every query", place.prefix, len(store))
        index = ExactIndex(store.keys, Metric.L2, deleted=store.deleted if len(store.deleted) else None)
    else:
        metric, name = index_metric(place.index), place.index
        index = open_faiss(name, metric, store.prefix, store.digest, store.deleted, probe=settings.probe, mapped=False)
    return ExternalMemory(store, index, _fitting_k(settings.k, store), score)


def _fitting_k(k: int | None, store: Datastore) -> int:
    """Neighbours per position that a store has. Raises: ValueError when more were asked for."""
    most = store.num_alive
    if k is None and most < DEFAULT_K:
        logger.warning("k=%d: datastore %s has fewer rows than the default k=%d", most, store.prefix, DEFAULT_K)
    elif k is not None and k > most:
        raise ValueError(
            f"k={k} is larger than datastore {store.prefix!r}, which has {most} rows; pass k={most} or less"
        )
    return min(DEFAULT_K, most) if k is None else k


def open_store(place: StorePlace, *, with_keys: bool) -> Datastore:
    """Open the store alone. Raises: ValueError when its files are not as their name says."""
    if place.rows is None or place.dim is None:
        return Datastore.open(place.prefix, StoreHints(), with_keys=with_keys)
    hints = StoreHints(dim=place.dim, size=place.rows, fp16=True)
    return Datastore.open(place.prefix, hints, with_keys=with_keys)


def check_fits(store: Datastore, model: nn.Module, tap: Tap, tokenizer: Tokenizer | None = None) -> None:
    """Compare a store with the model that is to use it, as far as its files state what it was saved with.

    Raises: ValueError with both values.
    """
    size, metadata, name = vocabulary_size(model), store.metadata, f"datastore {store.prefix!r}"
    if store.dim != tap.dim:
        raise ValueError(
            f"{name} has keys of width {store.dim}, the model makes keys of width {tap.dim}; save a store with this "
            "model (KNNSaver)"
        )
    saved_tap = metadata.get("key_tap")
    if saved_tap not in (None, tap.kind.value):
        raise ValueError(
            f"{name} holds keys of {saved_tap}, and knn_keytype is {tap.kind.value}; pass "
            f"knn_keytype={saved_tap!r}, or save it again"
        )
    saved_size = metadata.get("dictionary_size")
    if saved_size is not None and saved_size != size:
        raise ValueError(
            f"{name} was saved with a vocabulary of {saved_size} tokens, the model has {size}; use the model it was "
            "saved with, or save it again"
        )
    saved = metadata.get("dictionary_digest")
    given = tokenizer_digest(tokenizer) if tokenizer is not None else None
    if saved is not None and given is not None and saved != given:
        raise ValueError(
            f"{name} was saved with another tokenizer (digest {saved[:12]}) than this one (digest {given[:12]}): its "
            "tokens are numbered otherwise; use the tokenizer it was saved with, or save it again"
        )
    if not metadata:
        low, high = (f(g(part) for part in store.values.chunks) for f, g in ((min, _low), (max, _high)))
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} holds tokens {low} to {high}, the model's vocabulary has {size}: it is of another tokenizer"
            )
    saved_model = metadata.get("model_digest")
    if saved_model is not None and saved_model != model_digest(model):
        logger.warning("%s was saved with other weights than this model's; its keys may lie elsewhere", name)


def store_metadata(model: nn.Module, tap: Tap, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Metadata of a store saved with a model."""
    metadata = {"key_tap": tap.kind.value, "model_type": model_type(model), "model_digest": model_digest(model)}
    metadata |= {"dictionary_size": vocabulary_size(model)}  # type: ignore[dict-item]
    return metadata | ({} if tokenizer is None else {"dictionary_digest": tokenizer_digest(tokenizer)})


def with_index(place: StorePlace, index: str | Path | None) -> StorePlace:
    """The same store with an index the user names. Raises: ValueError when there is no such file."""
    if index is None:
        return place
    if not Path(index).is_file() or Path(index).suffix not in _ENDINGS:
        raise ValueError(f"no index at {str(index)!r}; its name ends in {', '.join(_ENDINGS)}")
    return replace(place, index=Path(index))


def _is_store(prefix: str) -> bool:
    return StoreFiles.of(prefix).metadata.exists() or StoreFiles.of(prefix).values.exists()


def _prefixes(folder: Path) -> list[str]:
    """Prefixes of the stores in a folder."""
    return sorted(str(path).removesuffix("_vals.npy") for path in folder.glob("*_vals.npy"))


def _low(part: Array) -> int:
    return int(part.min())


def _high(part: Array) -> int:
    return int(part.max())
