"""The datastore of the training pairs: every process writes its shard; the first joins, indexes and clusters them.

A shard is a range of whole batches, in the order of the file: rows do not depend on the number of shards, to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq.hf.hooks.inner_model import inner_model
from fairseq.hf.hooks.names import key_type
from fairseq.hf.hooks.taps import Tap, find_tap
from fairseq.hf.knn.evaluation import save_datastore
from fairseq.hf.knn.indexing import cluster_config, index_config
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.stores import StorePlace, find_index, find_members, open_store, store_metadata
from fairseq.hf.pipeline.config import EXACT, PipelineConfig
from fairseq.hf.pipeline.dataset import Pairs, open_pairs
from fairseq.hf.pipeline.fabric import check_devices, launch
from fairseq.hf.pipeline.identity import config_digest
from fairseq.hf.pipeline.models import Base, load_model, tuned_model
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.datastore.merge import join_shards
from fairseq.memory.datastore.metadata import shard_prefix, store_exists
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.files import BuildFiles, is_complete, signature_of
from fairseq.memory.index.build.preflight import StoreShape, check_build
from fairseq.memory.retomaton.build_clusters import build_clusters
from fairseq.runtime.files import read_json

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger(__name__)

_NAME = "store"
_PLACE = ("shard_id", "num_shards", "first_row", "total_rows")


@dataclass(frozen=True)
class SavedStore:
    """A datastore and what was made of it."""

    prefix: str
    rows: int
    dim: int
    num_shards: int
    index: Path | None
    clusters: Path | None
    was_complete: bool
    seconds: float


def store_prefix(config: PipelineConfig) -> str:
    """Prefix of the files of the datastore."""
    return str(Path(config.knn.store_dir) / _NAME)


def save_store(config: PipelineConfig) -> SavedStore | None:
    """Save, index and cluster the datastore, or resume. None in all processes but the first.

    Raises: ValueError before the long part when a size is wrong, or the folder has the store of another model or text.
    """
    check_devices(config)
    base = Base.of(config)
    name = tuned_model(config, base)
    pairs = open_pairs(base.encoder, "train")
    check_sizes(config, int(pairs.lengths.sum()), "the training pairs make")
    model = load_model(base, name, config.fabric.precision)
    tap = find_tap(inner_model(model), key_type(config.knn.key_type))
    facts = _facts(config, base, model, tap, pairs)
    _check_index(config, _PlannedStore(int(pairs.lengths.sum()), tap.dim))
    prefix, started = store_prefix(config), time.perf_counter()
    was_complete = store_exists(prefix, facts)
    if not was_complete:
        _require_unused(prefix, facts)
    fabric = launch(config)
    if not was_complete:
        _save_shard(fabric, config, base, model, pairs, facts)
    if fabric.global_rank != 0:
        return None
    place = StorePlace.find(prefix, base.config.model_type)
    store = open_store(place, with_keys=True)
    index, before = None, _files_beside(prefix)
    if config.knn.index != EXACT:
        index = build_index(_index_config(config, place, store)).path
    if config.knn.enable_retomaton:
        build_clusters(cluster_config(place))
    was_complete = was_complete and _files_beside(prefix) == before
    seconds = time.perf_counter() - started
    shards = len(store.metadata.get("parts", "1"))
    return SavedStore(prefix, len(store), store.dim, shards, index, find_members(prefix), was_complete, seconds)


def _files_beside(prefix: str) -> dict[Path, int]:
    """Index and clusters of a store, and numbers that change with every new file."""
    return {path: path.stat().st_ino for path in (find_index(prefix), find_members(prefix)) if path is not None}


def _index_config(config: PipelineConfig, place: StorePlace, store: StoreShape) -> BuildConfig:
    knn = config.knn
    kind = None if knn.index == "auto" else knn.index
    return index_config(place, store, index=kind, probe=knn.probe, use_faiss_cpu=not knn.use_gpu)


@dataclass(frozen=True)
class _PlannedStore:
    """A datastore that is still to be saved."""

    rows: int
    dim: int

    def __len__(self) -> int:
        return self.rows


def _check_index(config: PipelineConfig, store: StoreShape) -> None:
    """Raise ValueError when the index that the config names cannot be built, or is in the way of a search of all."""
    prefix, index = store_prefix(config), find_index(store_prefix(config))
    if config.knn.index != EXACT:
        try:
            check_build(_index_config(config, StorePlace(prefix, None, None, index), store), store)
        except ValueError as error:
            raise ValueError(str(error).replace("--index", "knn.index")) from None
    elif index is not None:
        raise ValueError(
            f"knn.index is {EXACT}, and searches would use the index {str(index)!r}; remove it, or name its kind"
        )


def check_sizes(config: PipelineConfig, rows: int, what: str) -> None:
    """Raise ValueError, with both values, where the config contradicts the number of rows."""
    knn = config.knn
    if knn.store_size not in (None, rows):
        raise ValueError(f"knn.store_size is {knn.store_size} and {what} {rows} rows; set it to null")
    if knn.k > rows:
        raise ValueError(f"knn.k is {knn.k} and {what} {rows} rows; set it to {rows} or less")


def open_finished(config: PipelineConfig) -> Datastore:
    """The datastore that store.py made.

    Raises: ValueError when it is missing or contradicts the config, and so for its index and its clusters.
    """
    prefix = store_prefix(config)
    if not StoreFiles.of(prefix).metadata.exists():
        raise ValueError(f"knn.store_dir {config.knn.store_dir!r} holds no finished datastore; run store.py")
    store = Datastore.open(prefix, with_keys=False)
    check_sizes(config, len(store), f"datastore {prefix!r} has")
    _check_index(config, store)
    if config.knn.index != EXACT:
        wanted = _index_config(config, StorePlace(prefix, None, None, None), store)
        files = BuildFiles.of(wanted)
        if not is_complete(files, signature_of(wanted, store)):
            found = f"has another index than knn.index {config.knn.index}" if files.index.exists() else "has no index"
            raise ValueError(f"datastore {prefix!r} {found}; run store.py, or set knn.index to the kind it has")
    if config.knn.enable_retomaton and find_members(prefix) is None:
        raise ValueError(f"knn.enable_retomaton: datastore {prefix!r} has no clusters; run store.py with it")
    return store


def _facts(config: PipelineConfig, base: Base, model: Any, tap: Tap, pairs: Pairs) -> dict[str, Any]:
    """What the rows follow from."""
    more = {"text_digest": pairs.digest, "num_documents": len(pairs), "precision": config.fabric.precision}
    more |= {"model_config": config_digest(model.config)}
    more |= {"key_dtype": config.knn.key_dtype, "rows": int(pairs.lengths.sum())}
    return store_metadata(model, tap, base.tokenizer) | more


def _require_unused(prefix: str, facts: dict[str, Any]) -> None:
    file = StoreFiles.of(prefix).metadata
    made = read_json(file) if file.exists() else {}
    for name, value in facts.items():
        if name in made and made[name] != value:
            raise ValueError(
                f"datastore {prefix!r} has {name} {made[name]!r}, that of this command is {value!r}; name another "
                "knn.store_dir, or remove it"
            )


def _save_shard(
    fabric: Fabric, config: PipelineConfig, base: Base, model: Any, pairs: Pairs, facts: dict[str, Any]
) -> None:
    """Write this process's rows; the first one then makes one store of all."""
    prefix, size = store_prefix(config), config.data.eval_batch_size
    shard, num_shards = fabric.global_rank, fabric.world_size
    num_batches = -(-len(pairs) // size)
    if num_shards > num_batches:
        raise ValueError(
            f"{num_shards} devices are more than the {num_batches} batches of the training pairs; use fewer, or a "
            "smaller data.eval_batch_size"
        )
    first, end = (min(len(pairs), num_batches * at // num_shards * size) for at in (shard, shard + 1))
    rows = int(pairs.lengths[first:end].sum())
    facts = {name: value for name, value in facts.items() if name not in ("key_dtype", "rows")}
    own, name = dict(facts), _NAME
    if num_shards > 1:
        before = int(pairs.lengths[:first].sum())
        own |= dict(zip(_PLACE, (shard, num_shards, before, int(pairs.lengths.sum()))))
        name = Path(shard_prefix(prefix, shard, num_shards)).name
    if num_shards == 1 or not store_exists(Path(prefix).with_name(name), own | {"rows": rows}):
        saver = KNNSaver(
            rows,
            config.knn.store_dir,
            knn_keytype=config.knn.key_type,
            name=name,
            dtype=config.knn.key_dtype,
            tokenizer=base.tokenizer,
            metadata=own,
            first_sequence=first,
        )
        with on_device(fabric, model), saver(model):
            save_datastore(model, _pieces(pairs, first, end), saver, batch_size=size)
    fabric.barrier()
    if num_shards > 1 and fabric.global_rank == 0:
        join_shards(prefix, num_shards)


def _pieces(pairs: Pairs, first: int, end: int) -> Iterator[Any]:
    return (pairs.piece(number) for number in range(first, end))


def on_device(fabric: Fabric, model: Any) -> AbstractContextManager[Any]:
    """Context manager: the model on its device, for reading, in the precision of the run."""
    model.to(fabric.device).eval()
    precise: AbstractContextManager[Any] = fabric.autocast()
    return precise
