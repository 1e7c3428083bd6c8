"""One compiled call from a query to mixed log-probabilities, against the look-up and the formula."""

from __future__ import annotations

import faiss
import numba
import numpy as np
import pytest
import torch

from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.lists import adc_search, byte_table_kernels
from fairseq.memory.scoring import interpolate, vocab_logp
from fairseq.memory.similarity import normalized
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Metric

ROWS, DIM, VOCABULARY = 3000, 16, 40


def memory_of(metric, k=300, deleted=(), quantizer=None, value_dtype=np.int64, probe=6):
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((ROWS, DIM), dtype=np.float32)
    keys = normalized(torch.from_numpy(keys)).numpy() if metric is Metric.COS else keys
    kind = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    inner = faiss.index_factory(DIM, f"IVF20{quantizer or ''},PQ8np", kind)
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, metric, deleted=np.asarray(deleted, np.int64))
    index.set_probe(probe)
    values = draw.integers(0, VOCABULARY, ROWS).astype(value_dtype)
    store = Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})
    return ExternalMemory(store, index, k, "index"), torch.from_numpy(keys[:5] + np.float32(0.2))


def mixed(memory, query_ND, weight=0.3, temperature=0.7):
    """Scores by one call for each query, and by look-ups."""
    scores_NV = torch.randn(len(query_ND), VOCABULARY, generator=torch.Generator().manual_seed(0)) * 5
    mixer, ours_NV = VocabularyMixer(weight, temperature), scores_NV.clone()
    done = [mixer.mix_nearest_(ours_NV[n : n + 1], query_ND[n : n + 1], memory) for n in range(len(query_ND))]
    found = memory.lookup(query_ND)
    formula_NV = interpolate(
        torch.log_softmax(scores_NV.double(), 1), vocab_logp(found, VOCABULARY, temperature).double(), weight
    )
    mixer.mix_(scores_NV, None, found)
    return done, ours_NV, scores_NV, formula_NV


@pytest.mark.parametrize("sums", ["", "plain", "avx512_vbmi"])
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("deleted", [(), range(0, ROWS, 3)])
def test_equals_the_look_up(metric, deleted, sums, monkeypatch):
    if sums not in ("", "plain", adc_search.byte_sums()):
        pytest.skip("this CPU does not look up bytes")
    monkeypatch.setattr(adc_search, "byte_sums", lambda: sums)
    done, ours_NV, theirs_NV, formula_NV = mixed(*memory_of(metric, deleted=deleted))
    assert all(done)
    torch.testing.assert_close(ours_NV, theirs_NV, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours_NV.double(), formula_NV, atol=1e-5, rtol=1e-6)
    assert torch.equal(ours_NV.argmax(1), theirs_NV.argmax(1))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_of_the_weight(weight):
    done, ours_NV, theirs_NV, _ = mixed(*memory_of(Metric.L2), weight=weight)
    assert all(done)
    torch.testing.assert_close(ours_NV, theirs_NV, atol=1e-6, rtol=1e-6)


def test_tokens_of_other_types_are_those_of_the_store():
    done, ours_NV, theirs_NV, _ = mixed(*memory_of(Metric.L2, value_dtype=np.int16))
    assert all(done)
    torch.testing.assert_close(ours_NV, theirs_NV, atol=1e-6, rtol=1e-6)


def test_another_number_of_lists_is_heeded():
    memory, query_ND = memory_of(Metric.L2)
    for probe in (6, 20, 4):
        memory.index.set_probe(probe)
        done, ours_NV, theirs_NV, _ = mixed(memory, query_ND)
        assert all(done)
        torch.testing.assert_close(ours_NV, theirs_NV, atol=1e-6, rtol=1e-6)


def test_scores_stay_where_lists_hold_too_few_keys_or_the_query_is_not_a_number():
    memory, query_ND = memory_of(Metric.L2, k=1500, probe=2)
    for query_1D in (query_ND[:1], torch.full((1, DIM), torch.nan)):
        scores_1V = torch.randn(1, VOCABULARY)
        before_1V = scores_1V.clone()
        assert not VocabularyMixer(0.3).mix_nearest_(scores_1V, query_1D, memory)
        assert torch.equal(scores_1V, before_1V)


def test_takes_what_it_cannot_do_to_the_look_up():
    memory, query_ND = memory_of(Metric.L2)
    mixer = VocabularyMixer(0.3)
    assert not mixer.mix_nearest_(torch.zeros(1, VOCABULARY, dtype=torch.bfloat16), query_ND[:1], memory)
    assert not mixer.mix_nearest_(torch.zeros(VOCABULARY, 1).T.expand(2, -1)[:1, ::2], query_ND[:1], memory)
    graph, _ = memory_of(Metric.L2, quantizer="_HNSW8")
    assert not mixer.mix_nearest_(torch.zeros(1, VOCABULARY), query_ND[:1], graph)
    few, _ = memory_of(Metric.L2, k=5)
    assert not mixer.mix_nearest_(torch.zeros(1, VOCABULARY), query_ND[:1], few)


def test_tokens_beyond_the_vocabulary_are_an_error():
    memory, query_ND = memory_of(Metric.L2)
    with pytest.raises(ValueError, match="beyond the vocabulary of 10"):
        VocabularyMixer(0.3).mix_nearest_(torch.zeros(1, 10), query_ND[:1], memory)


@pytest.mark.parametrize("by_distance", [True, False])
@pytest.mark.parametrize("num_lists", [7, 64])
def test_nearest_lists_are_those_of_brute_force(by_distance, num_lists):
    from fairseq.memory.index.lists.single_search_kernels import nearest_lists

    draw = np.random.default_rng(0)
    centroid_LD = draw.integers(-2, 3, (num_lists, 6)).astype(np.float32)  # many tie
    query_QD = draw.integers(-2, 3, (20, 6)).astype(np.float32)
    probed_QP = np.empty((20, 5), np.int64)
    room = np.empty(num_lists, np.float32), np.empty(num_lists + 1, np.int64)
    nearest_lists(query_QD, centroid_LD, by_distance, *room, probed_QP)
    scores_QL = -((query_QD[:, None] - centroid_LD) ** 2).sum(2) if by_distance else query_QD @ centroid_LD.T
    assert (probed_QP == np.argsort(-scores_QL, axis=1, kind="stable")[:, :5]).all()


@pytest.mark.parametrize("count", [5, 6, 100])
def test_the_best_are_kept(count):
    from fairseq.memory.index.lists.single_search_kernels import keep_best

    ends = np.iinfo(np.int64)
    packed = np.random.default_rng(count).integers(ends.min, ends.max, count, np.int64)
    kept = packed.copy()
    numba.njit(lambda packed_F: keep_best(packed_F, 5))(kept)  # Python cannot call it
    assert sorted(kept[:5]) == sorted(packed)[:5]


def test_a_table_is_rounded_within_its_bound():
    table_MJ = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    table_MJ[0] *= 1000.0
    byte_2MJ = np.empty((2, 8, 256), np.uint8)
    rounded = numba.njit(lambda table_MJ, byte_2MJ: byte_table_kernels.round_table(table_MJ, byte_2MJ))
    step, base, most = rounded(table_MJ, byte_2MJ)
    entry_MJ = byte_2MJ[0] * 256.0 + byte_2MJ[1]
    off = (entry_MJ.sum(0) + base) * step - table_MJ.astype(np.float64).sum(0)
    assert np.abs(off).max() <= 8 * byte_table_kernels.MOST_STEPS * step
    np.testing.assert_allclose(most, np.abs(table_MJ).max(1).sum(), rtol=1e-5)


def test_rows_that_the_index_got_since_have_no_tokens():
    memory, query_ND = memory_of(Metric.L2)
    mixed(memory, query_ND)
    memory.index.inner.add(np.repeat(query_ND[:1].numpy(), 500, 0))
    scores_1V = torch.randn(1, VOCABULARY)
    before_1V = scores_1V.clone()
    assert not VocabularyMixer(0.3).mix_nearest_(scores_1V, query_ND[:1], memory)
    assert torch.equal(scores_1V, before_1V)
    with pytest.raises(IndexError):
        memory.lookup(query_ND[:1])
    with pytest.raises(IndexError):
        memory.lookup_logp(query_ND[:1], torch.zeros(1, dtype=torch.int64), 1.0)


def test_only_one_query_of_the_width_of_the_index_is_searched():
    memory, query_ND = memory_of(Metric.L2)
    for width in (DIM // 2, 2 * DIM):
        with pytest.raises(ValueError, match=f"do not fit an index of width {DIM}"):
            VocabularyMixer(0.3).mix_nearest_(torch.zeros(1, VOCABULARY), torch.ones(1, width), memory)
    assert not VocabularyMixer(0.3).mix_nearest_(torch.zeros(2, VOCABULARY), query_ND[:2], memory)
