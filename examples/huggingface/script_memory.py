"""The datastore of a command: saved, indexed, clustered, opened."""

from __future__ import annotations

import sys
from typing import Any

from script_arguments import KnnArguments
from script_models import evaluating
from transformers import TrainingArguments

from fairseq.hf.knn.evaluation import save_datastore
from fairseq.hf.knn.indexing import cluster_config, index_config
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.stores import StorePlace, open_store
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.build.build import BuiltIndex, build_index
from fairseq.memory.index.sharded.early import begin_search
from fairseq.memory.retomaton.build_clusters import BuiltClusters, build_clusters


def check_store(config: Any, knn: KnnArguments) -> None:
    """Raise ValueError when a store that is to be used is not there or not as stated; before a model is loaded."""
    if knn.makes_memory and not knn.save_knnlm_dstore or knn.uses_memory:
        find_store(config, knn)


def find_store(config: Any, knn: KnnArguments) -> tuple[StorePlace, Datastore]:
    """The store and where it is. Raises: ValueError when it is missing or of other sizes than stated."""
    place = StorePlace.find(str(knn.dstore_dir), config.model_type, knn.dstore_size, knn.dimension)
    store = open_store(place, with_keys=not knn.no_load_keys)
    if knn.dimension is not None and knn.dimension != store.dim:
        raise ValueError(f"datastore {store.prefix!r} has keys of width {store.dim}; --dimension says {knn.dimension}")
    return place, store.require(size=knn.dstore_size)


def save(model: Any, tokenizer: Any, pieces: Any, knn: KnnArguments, batch_size: int) -> tuple[str, int]:
    """Save the keys of windows or pairs. Returns the store's prefix and rows; a run that was killed goes on."""
    saver = KNNSaver(
        dstore_size=knn.dstore_size,
        dstore_dir=str(knn.dstore_dir),
        dimension=knn.dimension,
        knn_keytype=knn.knn_keytype,
        tokenizer=tokenizer,
        overwrite_dstore=knn.overwrite_dstore,
    )
    with saver(model):
        rows = save_datastore(model, pieces, saver, batch_size=batch_size)
    assert saver.prefix is not None
    return saver.prefix, rows


def index(config: Any, knn: KnnArguments) -> BuiltIndex:
    """Build the index over the store that is in the folder."""
    place, store = find_store(config, knn)
    sizes = {"ncentroids": knn.ncentroids, "code_size": knn.code_size, "probe": knn.probe}
    at_a_time = knn.num_keys_to_add_at_a_time
    return build_index(index_config(place, store, num_keys_to_add_at_a_time=at_a_time, **sizes))


def cluster(config: Any, knn: KnnArguments) -> BuiltClusters:
    """Cluster the keys of the store that is in the folder; a run that was killed goes on."""
    place, _ = find_store(config, knn)
    sizes = {"num_clusters": knn.num_clusters, "sample_size": knn.sample_size}
    return build_clusters(cluster_config(place, clusters=knn.members, **sizes))


def make(model: Any, config: Any, tokenizer: Any, pieces: Any, knn: KnnArguments, training: TrainingArguments) -> None:
    """Save, index and cluster a store, as far as the flags ask for it."""
    if knn.save_knnlm_dstore:
        with evaluating(model, training):
            prefix, rows = save(model, tokenizer, pieces, knn, training.per_device_eval_batch_size)
        sys.stdout.write(f"saved {rows} keys to {prefix}\n")
    if knn.build_index:
        built = index(config, knn)
        sys.stdout.write(f"built {built.path} over {built.rows} keys\n")
    if knn.cluster_dstore:
        made = cluster(config, knn)
        sys.stdout.write(f"made {made.num_clusters} clusters of {made.rows} keys: {made.path}\n")


def begin(knn: KnnArguments, training: TrainingArguments) -> None:
    """Start Ray, if it is to search, while text and model are loaded."""
    if knn.uses_memory and not training.do_train:
        begin_search(knn.search_on)


def wrapper(knn: KnnArguments, tokenizer: Any) -> KNNWrapper | None:
    """What the evaluation breaks into the model; None for the model alone."""
    if not knn.uses_memory:
        return None
    shared: dict[str, Any] = {
        "dstore_size": knn.dstore_size,
        "dstore_dir": str(knn.dstore_dir),
        "dimension": knn.dimension,
        "knn_sim_func": knn.knn_sim_func,
        "knn_keytype": knn.knn_keytype,
        "no_load_keys": knn.no_load_keys,
        "move_dstore_to_mem": knn.move_dstore_to_mem,
        "knn_gpu": knn.knn_gpu,
        "recompute_dists": knn.recompute_dists,
        "k": knn.k,
        "lmbda": knn.lmbda,
        "knn_temp": knn.knn_temp,
        "probe": knn.probe,
        "search_on": knn.search_on,
        "search_workers": knn.search_workers,
        "tokenizer": tokenizer,
    }
    if knn.knn:
        return KNNWrapper(**shared)
    return RetomatonWrapper(
        no_pointer=knn.no_pointer,
        min_knns=knn.min_knns,
        max_knns=knn.max_knns,
        members=knn.members,
        compat=knn.retomaton_compat,
        **shared,
    )
