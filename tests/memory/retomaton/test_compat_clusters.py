"""``compat`` with clusters, against the original program's rules in plain Python, one position after another."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.retomaton.automaton import Retomaton
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.retomaton.reader import read_text
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Metric

DIM, VOCAB, ROWS, K = 3, 4, 80, 6


class Rules:
    """A store and the rules: which pointers are followed, which clusters are added, when a search is due."""

    def __init__(self, seed: int, min_knns: int, max_knns: int) -> None:
        rng = np.random.default_rng(seed)
        self.keys = rng.standard_normal((ROWS, DIM), dtype=np.float32)
        self.values = rng.integers(0, VOCAB, ROWS)
        self.cluster = rng.integers(0, 12, ROWS)
        self.min_knns, self.max_knns = min_knns, max_knns

    def read(self, queries: np.ndarray, tokens: np.ndarray) -> tuple[list[list[int]], int]:
        """Rows of the candidates of each position, and the number of searches."""
        pointers: list[int] = []
        offered, searches = [], 0
        for query, token in zip(queries.astype(np.float64), tokens):
            distance = ((self.keys.astype(np.float64) - query) ** 2).sum(1)
            rows = []
            if len(pointers) < self.min_knns:  # before members of clusters are added
                searches += 1
                rows = sorted(range(ROWS), key=lambda row: distance[row])[:K]
            active = list(pointers)
            if len(pointers) < self.max_knns:
                counts = Counter(int(self.cluster[row]) for row in pointers)
                for cluster in sorted(counts, key=lambda number: (-counts[number], number)):
                    active += [row for row in range(ROWS) if self.cluster[row] == cluster]
            rows += active[: self.max_knns]
            offered.append(rows)
            held = sorted((row for row in rows if self.values[row] == token), key=lambda row: distance[row])
            pointers = [row + 1 for row in held if row + 1 < ROWS]
        return offered, searches


@pytest.mark.parametrize("max_knns", [5, 30, 1000])
@pytest.mark.parametrize("min_knns", [1, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_compat_with_clusters_follows_the_original_rules(seed: int, min_knns: int, max_knns: int) -> None:
    rules = Rules(seed, min_knns, max_knns)
    store = Datastore("store", ChunkedArray.of(rules.keys), ChunkedArray.of(rules.values), {})
    automaton = Retomaton(
        ExternalMemory(store, ExactIndex(store.keys, Metric.L2), K),
        min_knns=min_knns,
        max_knns=max_knns,
        clusters=Clusters.of_assignment(rules.cluster, 12),
        compat=True,
    )
    rng = np.random.default_rng(100 + seed)
    queries, tokens = rng.standard_normal((30, DIM), dtype=np.float32), rng.integers(0, VOCAB, 30)
    found: dict[int, list[int]] = {}
    done = read_text(
        automaton,
        torch.from_numpy(queries),
        torch.from_numpy(tokens),
        torch.tensor([30]),
        lambda place_B, candidates: None,
        keep=lambda place_B, step: found.update({int(place_B[0]): step.rows_BM[0][step.rows_BM[0] >= 0].tolist()}),
    )
    offered, searches = rules.read(queries, tokens)
    assert [found[place] for place in range(30)] == offered
    assert done.num_searched == searches
    assert searches > 0


def test_members_of_clusters_save_no_search_in_compat() -> None:
    saved = {}
    for compat in (False, True):
        rules = Rules(0, 8, 1000)
        store = Datastore("store", ChunkedArray.of(rules.keys), ChunkedArray.of(rules.values), {})
        external = ExternalMemory(store, ExactIndex(store.keys, Metric.L2), K)
        clusters = Clusters.of_assignment(rules.cluster, 12)
        automaton = Retomaton(external, min_knns=8, clusters=clusters, compat=compat)
        query_ND, token_N = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(40) % VOCAB
        done = read_text(automaton, query_ND, token_N, torch.tensor([40]), lambda *_: None)
        saved[compat] = 40 - done.num_searched
    assert saved[True] < saved[False]
