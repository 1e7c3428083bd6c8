"""The compiled way through given text sums up what a reader hands over position by position."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.retomaton.automaton import Retomaton
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.retomaton.reader import read_text
from fairseq.memory.retomaton.walk import can_walk, walk_text
from fairseq.memory.scoring import log_sums
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Metric

ROWS, DIM, TYPES, TEMPERATURE = 1500, 8, 6, 0.8


def automaton_of(metric=Metric.L2, value_dtype=np.int64, clusters=True, deleted=(), **settings):
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((ROWS, DIM), dtype=np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True) if metric is Metric.COS else 1.0
    values = draw.integers(0, TYPES, ROWS).astype(value_dtype)
    inner = faiss.index_factory(
        DIM, "IVF12,PQ4np", faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    )
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, metric, deleted=np.asarray(deleted, np.int64))
    index.set_probe(3)
    store = Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})
    memory = ExternalMemory(store, index, 20, "index")
    held = Clusters.of_assignment(draw.integers(0, 90, ROWS), 90) if clusters else None
    return Retomaton(memory, clusters=held, **settings)


def text_of(lengths):
    draw = np.random.default_rng(1)
    query_ND = torch.from_numpy(draw.standard_normal((sum(lengths), DIM), dtype=np.float32))
    return query_ND, torch.from_numpy(draw.integers(0, TYPES, sum(lengths))), torch.tensor(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": Metric.IP},
        {"metric": Metric.COS, "value_dtype": np.int32},
        {"clusters": False, "value_dtype": np.int16},
        {"min_knns": 5, "max_knns": 7},
        {"min_knns": 2, "max_knns": 3000, "deleted": range(0, ROWS, 7)},
    ],
)
@pytest.mark.parametrize("lengths", [[40, 0, 3, 1, 25], [1], [0]])
def test_sums_and_searches_are_those_of_reading(settings, lengths, threads):
    automaton, text = automaton_of(**settings), text_of(lengths)
    hit_N, whole_N = (torch.full((sum(lengths),), -torch.inf) for _ in range(2))

    def use(place_B, found):
        sums = log_sums(found, text[1][place_B], TEMPERATURE)
        hit_N[place_B], whole_N[place_B] = sums.hit_N, sums.whole_N

    done = read_text(automaton, *text, use, ahead=True)
    assert can_walk(automaton)
    ours, num_searched = walk_text(automaton, *text, TEMPERATURE)
    assert num_searched == done.num_searched
    torch.testing.assert_close(ours.hit_N, hit_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.whole_N, whole_N, rtol=1e-5, atol=1e-5)


def test_a_way_is_compiled_only_where_codes_score_pointers():
    assert not can_walk(automaton_of(compat=True))
    assert not can_walk(automaton_of(no_pointer=True))
    memory = automaton_of().external
    assert not can_walk(Retomaton(ExternalMemory(memory.store, ExactIndex(memory.store.keys), 4)))
