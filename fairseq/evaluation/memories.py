"""The memories that a command's configs name, opened, checked against the model and made into a reader."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING

from fairseq.config import flag_names
from fairseq.memory.retomaton.config import RetomatonConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairseq.evaluation.config import EvaluationConfigs
    from fairseq.evaluation.readers import IntArray, KeptNeighborsReader
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.combiners.interpolation import Interpolation
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.sources.base import TextSource
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.types import MemoryReader
    from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)


def check_knn(configs: EvaluationConfigs) -> None:
    """Raise ValueError where options of a memory are given that would not be used, or that lack what they need."""
    if configs.memory.knn_neighbors and (configs.retomaton.retomaton or configs.knn.search_on):
        other = "--retomaton" if configs.retomaton.retomaton else "--search-on"
        raise ValueError(f"--knn-neighbors searches nothing, and {other} is a way to search: leave one of them out")
    if configs.decoder.memory_decoder and configs.memory.save_knnlm_dstore:
        raise ValueError(
            f"--memory-decoder {configs.decoder.memory_decoder} changes no key of --save-knnlm-dstore: leave it out"
        )
    retomaton, knn, given = configs.retomaton, configs.knn, configs.command.given
    own = [field for field in dataclasses.fields(RetomatonConfig) if field.name in given]
    if own and not retomaton.retomaton:
        raise ValueError(f"{flag_names(own[0])[0]} belongs to --retomaton: give it too, or leave it out")
    if retomaton.retomaton and not configs.memory.knnlm:
        raise ValueError("--retomaton is a way to find the neighbours of --knnlm: give it and its datastore too")
    if retomaton.clusters and not os.path.isfile(retomaton.clusters):
        raise ValueError(
            f"--clusters: no file at {retomaton.clusters!r}; build_dstore.py --cluster_dstore makes clusters"
        )
    named = [(name, value) for name in ("dstore_filename", "indexfile", "search_on") if (value := getattr(knn, name))]
    if named and not configs.memory.knnlm:
        flag = f"--{named[0][0].replace('_', '-')}"
        raise ValueError(f"{flag} {named[0][1]} is read with --knnlm only: give it too, or leave {flag} out")
    if configs.bulk.save_retrieval and not configs.memory.knnlm:
        raise ValueError("--save-retrieval keeps the neighbours that --knnlm finds: give it too")


def check_trime(configs: EvaluationConfigs) -> None:
    """Raise ValueError for memories that do not go together."""
    trime, config, knn = configs.trime, configs.evaluation, configs.knn
    assert trime is not None
    if trime.use_long and trime.mem_size < config.context_window:
        raise ValueError(
            f"--mem-size {trime.mem_size} is less than --context-window {config.context_window}, so that the long-term "
            "memory reaches no further back than the input; give a larger one, or --use-local alone"
        )
    if knn.weight and not trime.interpolates:
        raise ValueError(f"--lmbda {knn.weight} has no effect without --use-interp; give both or neither")
    if trime.interpolates and not knn.weight:
        logger.warning("--lmbda is 0: the external memory's own distribution is mixed in with no share")
    if trime.use_external and knn.similarity == "index" and knn.faiss_metric_type != "ip":
        words = "--no-load-keys" if knn.no_load_keys else f"--knn-sim-func {knn.knn_sim_func}"
        raise ValueError(
            f"TRIME's similarity is the inner product; an index of metric {knn.faiss_metric_type!r} gives another one: "
            f"leave out {words}, or give an index built with --dist ip and --faiss-metric-type ip"
        )
    if trime.use_long and config.num_shards > 1:
        logger.warning("--num-shards: the long-term memory is empty at the start of every shard")
    if not (trime.use_local or trime.use_long or trime.use_external):
        logger.warning("neither --use-local nor --use-long nor --use-external: the language model alone is evaluated")
    if configs.bulk.save_retrieval and not trime.use_external:
        raise ValueError("--save-retrieval keeps the neighbours of the external memory: give --use-external too")


def open_reader(configs: EvaluationConfigs, evaluation: Evaluation) -> tuple[SequenceScorer, MemoryReader | None]:
    """The scorer, with the memories of the text, and the reader of the other memories; None for the model alone.

    Raises: ValueError or OSError when a memory is missing, damaged or not of this model.
    """
    return (_open_knn if configs.trime is None else _open_trime)(configs, evaluation)


def _open_knn(configs: EvaluationConfigs, evaluation: Evaluation) -> tuple[SequenceScorer, MemoryReader | None]:
    from fairseq.evaluation.readers import CandidateReader
    from fairseq.memory.combiners.interpolation import Interpolation
    from fairseq.sequence_scorer import SequenceScorer

    knn = configs.knn
    scorer = SequenceScorer(
        evaluation.models,
        key_tap=evaluation.key_tap if configs.memory.knnlm or configs.memory.save_knnlm_dstore else None,
        softmax_batch=configs.evaluation.softmax_batch,
        device=evaluation.device,
        decoder=evaluation.decoder,
    )
    if not configs.memory.knnlm:
        return scorer, None
    memory = _open_external(configs, evaluation, knn.similarity)
    combine = Interpolation(knn.weight, knn.temperature)
    if configs.retomaton.retomaton:
        from fairseq.memory.retomaton.reader import open_reader as open_retomaton

        return scorer, open_retomaton(configs.retomaton, memory, combine)
    if configs.memory.knn_neighbors:
        return scorer, _kept_neighbors(configs, evaluation, memory, combine)
    return scorer, CandidateReader(combine, memory)


def _kept_neighbors(
    configs: EvaluationConfigs, evaluation: Evaluation, memory: ExternalMemory, combine: Interpolation
) -> KeptNeighborsReader:
    """A reader of the neighbours in a file. Raises: ValueError when they are not of this text and store."""
    from fairseq.evaluation.readers import KeptNeighborsReader
    from fairseq.memory.gnn.neighbors import SplitNeighbors
    from fairseq.memory.retrieval.file import store_digest
    from fairseq.tasks.graph_batches import TextRows, require_same_rows

    path = str(configs.memory.knn_neighbors)
    neighbors = SplitNeighbors.open(path, train=memory.store, other_keys=True)
    neighbors.require(memory.k)
    blocks = evaluation.dataset.dataset.blocks
    prefix, made_of = path.removesuffix(".neighbors"), neighbors.made_of
    if made_of.get("store", store_digest(memory.store)) != store_digest(memory.store):
        require_same_rows(memory.store, _store_of(os.path.join(os.path.dirname(path), "train"), made_of["store"], path))
    if made_of:
        rows_of: Callable[[IntArray], IntArray] = TextRows(_store_of(prefix, made_of["queries"], path), blocks).find
    elif len(neighbors) == len(blocks.tokens):
        rows_of = _same
    else:
        raise ValueError(
            f"{path} holds neighbours of {len(neighbors)} tokens, split {configs.evaluation.gen_subset} has "
            f"{len(blocks.tokens)}; give the file of this split"
        )
    return KeptNeighborsReader(
        combine=combine, source=memory, neighbors=neighbors, starts_B=blocks.starts, rows_of=rows_of
    )


def _store_of(prefix: str, digest: str, path: str) -> Datastore:
    """The datastore that a file of neighbours was made with. Raises: ValueError when it is not there."""
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.retrieval.file import store_digest

    if os.path.isfile(f"{prefix}.json"):
        store = Datastore.open(prefix)
        if store_digest(store) == digest:
            return store
    raise ValueError(
        f"{path} was made with datastore {digest[:16]}, and {prefix} is not it: what its rows are cannot be told; keep "
        "the file beside the datastores of its split and of train (FOLDER/SPLIT.neighbors, FOLDER/SPLIT, FOLDER/train)"
    )


def _same(place_N: IntArray) -> IntArray:
    return place_N


def _open_trime(configs: EvaluationConfigs, evaluation: Evaluation) -> tuple[SequenceScorer, MemoryReader | None]:
    from fairseq.evaluation.readers import CandidateReader
    from fairseq.evaluation.trime_compat import replicate_tail_padding_bug
    from fairseq.memory.combiners.joint import JointNormalization
    from fairseq.memory.sources.local import LocalMemory
    from fairseq.memory.sources.rolling import RollingMemory
    from fairseq.sequence_scorer import SequenceScorer, TextMemory

    trime, knn, tap = configs.trime, configs.knn, evaluation.key_tap
    assert trime is not None
    sources: list[TextSource] = [LocalMemory()] if trime.use_local else []
    if trime.use_long:
        sources.append(RollingMemory(trime.mem_size, dedup=trime.dedup_memory))
    has_memory = bool(sources) or trime.use_external
    scorer = SequenceScorer(
        evaluation.models,
        key_tap=tap if has_memory else None,
        softmax_batch=configs.evaluation.softmax_batch,
        device=evaluation.device,
        text_memory=TextMemory(sources, knn.temperature) if sources else None,
        correct=None if trime.fix_tail_pads else replicate_tail_padding_bug,
        decoder=evaluation.decoder,
    )
    if not has_memory:
        return scorer, None
    external = None
    if trime.use_external:
        external = _open_external(configs, evaluation, "index" if knn.similarity == "index" else "dot")
    combine = JointNormalization(
        dim=evaluation.models[0].key_dim(tap),
        temperature=knn.temperature,
        with_external=trime.mode != "li",
        weight=knn.weight,
        interpolation_temperature=trime.interp_temp,
    )
    return scorer, CandidateReader(combine, external)


def _open_external(configs: EvaluationConfigs, evaluation: Evaluation, score: str) -> ExternalMemory:
    """The datastore and index that are named, checked against the model; ``score`` as in ``ExternalMemory``."""
    from fairseq.memory.sources.external import open_external
    from fairseq.runtime.manifest import file_digest

    tap, dictionary = evaluation.key_tap, evaluation.task.dictionary
    memory = open_external(
        configs.knn,
        score=score,
        dim=evaluation.models[0].key_dim(tap),
        key_tap=None if tap == "lm_output" else tap,
        dictionary_digest=dictionary.digest(),
        dictionary_size=len(dictionary),
        model_digest=None if tap == "lm_output" else lambda: file_digest(str(configs.evaluation.path)),
    )
    if tap == "lm_output":
        _require_output_of_lm(configs, evaluation, memory)
    return memory


def _require_output_of_lm(configs: EvaluationConfigs, evaluation: Evaluation, memory: ExternalMemory) -> None:
    """Raise ValueError, or warn, unless a store is of the language model within a GNN-LM.

    It is then of that one's own checkpoint, under the name of its own output, or of the GNN-LM's.
    """
    from fairseq.memory.sources.external import check_model
    from fairseq.runtime.manifest import file_digest

    saved = memory.store.metadata.get("key_tap", "model_output")
    if saved not in ("lm_output", "model_output"):
        raise ValueError(
            f"datastore {memory.store.prefix!r} holds keys of {saved}; --knn-keytype says lm_output: give {saved}, or "
            "save it again"
        )
    own = file_digest(str(configs.evaluation.path))
    within = evaluation.checkpoint.config.get("task", {}).get("lm_digest")
    by_own = memory.store.metadata.get("model_digest") == own
    without_graph = "('short_cut', True)" in str(memory.store.metadata.get("model_overrides"))
    if by_own and saved == "model_output" and not without_graph:
        raise ValueError(
            f"datastore {memory.store.prefix!r} holds keys of model_output of the GNN-LM itself, which have read the "
            "graph; --knn-keytype lm_output asks for states before it: give model_output, or the language model's "
            "datastore"
        )
    check_model(memory.store, lambda: own if by_own else (within or own), strict=configs.knn.strict_model)
