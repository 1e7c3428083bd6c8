"""Every kind of search on little data, so that every kernel is called with all types that it is called with.

Run as a program it prints which kernels were compiled, rather than found on disk, and which were called with types that
they do not declare, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import bm25s
import faiss
import numba
import numpy as np
import torch
from numba.core import event, sigutils

from fairseq.data.bm25.index import SCORING, Bm25Index
from fairseq.generation.steps import split_products
from fairseq.generation.steps.beam_cache import BeamCache
from fairseq.generation.steps.packed_products import PackedProducts
from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.lookup import LayerLookup, ScoreRule
from fairseq.memory.extended_mind.search import KernelSearch
from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.index.exact import index as exact_index
from fairseq.memory.index.exact.candidates import TrueScores
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.kmeans.kmeans import Assigner, kmeans
from fairseq.memory.index.lists import adc_search
from fairseq.memory.index.ops import products
from fairseq.memory.retomaton.automaton import Retomaton
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.retomaton.walk import walk_text
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.sources.log_sums import RowSums, log_sums
from fairseq.memory.types import Candidates, Metric, Neighbors

DIM, ROWS = 16, 3000


def run() -> None:
    """All searches, as on each kind of CPU."""
    shuffles = adc_search.byte_sums()
    ExactIndex._passing_share = lambda *_: 0.0  # type: ignore[method-assign]
    fine = products.finer(products.by_name(products.best_tiles()), DIM)
    assert fine is not None
    for name in (products.best_tiles(), fine.name, "library_int8", "float32"):
        adc_search.byte_sums = lambda name=name: "" if name == "float32" else shuffles  # type: ignore[assignment]
        products.chosen = lambda name=name: products.by_name(name)  # type: ignore[assignment]
        _exact_searches()
        _list_searches()
        kmeans(_keys(ROWS, DIM), 20, seed=0, iterations=2)
        Assigner(torch.from_numpy(_keys(20, DIM))).nearest(torch.from_numpy(_keys(ROWS, DIM)), 3)
        _extended_mind()
    _retomaton()
    _mixing()
    _segments()
    _beams()
    _sums()


def _keys(rows: int, dim: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)


def _exact_searches() -> None:
    keys = _keys(ROWS, DIM)
    query_ND = torch.from_numpy(_keys(200, DIM, 1))
    for metric in (Metric.L2, Metric.IP):
        for count, k in ((200, 4), (200, 2000), (3, 4)):  # as lists, block by block, and for few queries
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                ExactIndex(torch.from_numpy(keys).to(dtype), metric).search(query_ND[:count], k)
    # As after a GPU's search.
    TrueScores(ChunkedArray.of(keys), Metric.L2, query_ND).pairs(np.array([0, 1]), np.array([4, 2]))
    lengths = np.linspace(0.1, 3.0, ROWS, dtype=np.float32)[:, None]
    exact_index._SAMPLE_ROWS = 256  # of many keys a sample tells what to expect
    wide = _keys(ROWS, 128) * lengths  # block by block, although there are many
    ExactIndex(wide, Metric.IP).search(torch.from_numpy(_keys(100, 128, 1)), 300)
    plain = ExactIndex.has_wide_bounds
    ExactIndex.has_wide_bounds = lambda *_: True  # type: ignore[method-assign]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ExactIndex(torch.from_numpy(wide).to(dtype), Metric.IP).search(torch.from_numpy(_keys(100, 128, 1)), 300)
    ExactIndex.has_wide_bounds = plain  # type: ignore[method-assign]
    equal = np.repeat(keys[:3], 4000, 0)  # too many candidates that tie
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ExactIndex(torch.from_numpy(equal).to(dtype), Metric.L2).search(query_ND[:40], 4)


def _list_searches() -> None:
    keys = _keys(ROWS, DIM)
    query_ND = torch.from_numpy(_keys(700, DIM, 1))
    inner = faiss.index_factory(DIM, "IVF40,PQ4")
    inner.do_polysemous_training = False  # which takes 16 seconds
    inner.train(keys)
    inner.add(np.concatenate([keys, np.repeat(keys[:1], 100, 0)]))  # many that tie
    inner.nprobe = 6
    index = FaissIndex(inner, Metric.L2)
    index.search(torch.cat([query_ND, torch.from_numpy(keys[:3])]), 8)  # in bulk
    for count in (700, 3, 1):  # many neighbours: in bulk, by tables
        index.search(query_ND[:count], 200)
    rows = len(index)
    store = Datastore("store", ChunkedArray.of(_keys(rows, DIM)), ChunkedArray.of(np.arange(rows) % 20), {})
    memory = ExternalMemory(store, index, 200, "index")
    memory.lookup_logp(query_ND, torch.arange(700) % 20, 1.0)
    VocabularyMixer(0.3).mix_nearest_(torch.zeros(1, 20), query_ND[:1], memory)
    index.score_rows(query_ND[:4], torch.arange(40).view(4, 10))
    in_bytes = faiss.index_factory(DIM, "IVF10,SQ8")
    in_bytes.train(keys)
    in_bytes.add(keys)
    FaissIndex(in_bytes, Metric.L2).search(query_ND, 8)


def _extended_mind() -> None:
    key_GSD, value_GSD = (torch.from_numpy(_keys(2 * 300, DIM, seed)).view(2, 300, DIM) for seed in (0, 1))
    memory = Memory(
        layers={0: LayerMemory(key_GSD, value_GSD)},
        token_N=torch.arange(300),
        place_S=torch.arange(300),
        document_starts=(0,),
        model_digest=None,
        positions="origin",
        reach=0,
    )
    for count in (1, 2000):  # all at once, and block by block
        KernelSearch(key_GSD).search(torch.from_numpy(_keys(2 * count, DIM)).view(2, count, DIM), 4)
        for slope_H in (None, torch.ones(2)):
            rule = ScoreRule(0.25, slope_H=slope_H, before_B=None if slope_H is None else torch.zeros(1))
            query_BHTD = torch.from_numpy(_keys(2 * count, DIM)).view(1, 2, count, DIM)
            LayerLookup(memory, 0, MindSettings(topk=4)).attend(query_BHTD, rule, MindSettings(topk=4))


def _retomaton() -> None:
    keys, values = _keys(400, DIM), np.arange(400) % 7
    store = Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})
    for clusters in (None, Clusters.of_assignment(np.arange(400) % 20, 20)):
        external = ExternalMemory(store, ExactIndex(store.keys, Metric.L2), 8)
        automaton = Retomaton(external, min_knns=1, max_knns=16, no_pointer=False, clusters=clusters, compat=False)
        query_BD, state = torch.from_numpy(keys[:3]), automaton.start(3)
        for _ in range(2):
            step = automaton.lookup(query_BD, state)
            state = automaton.follow(step, step.found.values_NM[:, 0])
    for dtype in (np.int64, np.int32):
        tokens = Datastore("store", store.keys, ChunkedArray.of(values.astype(dtype)), {})
        inner = faiss.index_factory(DIM, "IVF4,PQ4np")
        inner.train(keys)
        inner.add(keys)
        automaton = Retomaton(ExternalMemory(tokens, FaissIndex(inner, Metric.L2), 8, "index"))
        automaton.lookup(query_BD, automaton.start(3))
        walk_text(automaton, query_BD, torch.arange(3), torch.tensor([3]), 1.0)


def _mixing() -> None:
    values_CM, scores_CM = torch.arange(12).view(3, 4), torch.zeros(3, 4)
    some_CM = torch.arange(12).view(3, 4) % 2 == 0
    for keep_CM in (torch.ones(3, 4, dtype=torch.bool), some_CM):
        VocabularyMixer(0.3).mix_(torch.zeros(3, 20), None, Candidates(values_CM, scores_CM, keep_CM))


def _segments() -> None:
    retriever = bm25s.BM25(**SCORING)
    retriever.index([["some", "words"], ["some"], ["words"]], show_progress=False)
    Bm25Index(retriever, "").search(["some words"], 0, 1)


def _beams() -> None:
    row_R1C = torch.ones(2, 1, 8)
    BeamCache().attend("0", row_R1C, row_R1C, row_R1C, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    PackedProducts()(row_R1C, torch.ones(3, 8), None)
    split_products.product(torch.ones(2, 32), torch.ones(3, 32), None)
    torch.set_num_threads(threads)


def _sums() -> None:
    value_1M, scores_NM, keep_NM = torch.arange(4)[None], torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    log_sums(Candidates(value_1M, scores_NM, keep_NM), torch.arange(2), 1.0)
    for dtype in (np.int64, np.int32):
        found = Neighbors(torch.arange(8).view(2, 4), scores_NM)
        RowSums(np.arange(8, dtype=dtype), torch.arange(2), 1.0).add(0, found)


class _Compilations(event.Listener):  # type: ignore[misc]
    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, event: Any) -> None:
        self.names.append(event.data["dispatcher"].py_func.__qualname__)

    def on_end(self, event: Any) -> None:
        pass


def main() -> None:
    compilations = _Compilations()
    event.register("numba:compile", compilations)
    run()
    from fairseq.memory.index.ops.kernels import KERNELS

    uncalled, undeclared = [], []
    for name, (kernel, signatures) in KERNELS.items():
        declared = {sigutils.normalize_signature(signature)[0] for signature in signatures}
        called = set(kernel.signatures)
        uncalled += [f"{name}{types}" for types in declared - called]
        undeclared += [f"{name}{types}" for types in called - declared]
    report: dict[str, Any] = {"compiled": list(compilations.names), "uncalled": uncalled, "undeclared": undeclared}
    numba.njit(lambda x: x)(1)
    report["sees_a_compilation"] = len(compilations.names) == len(report["compiled"]) + 1
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
