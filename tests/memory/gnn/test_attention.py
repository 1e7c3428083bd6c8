import pytest
import torch

from fairseq.memory.gnn import attention
from fairseq.memory.gnn.attention import banded_attention, neighbor_attention


def rows(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(high, *shape, seed):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def neighbor_inputs(heads, count=150, k=7, states=90, dim=20):
    keep_NK = drawn(3, count, k, seed=4) > 0
    keep_NK[3] = False
    return rows(count, heads, dim, seed=1), rows(states, dim, seed=2), drawn(states, count, k, seed=3), keep_NK


def dense(query_NHD, state_MD, index_NK, keep_NK):
    """Weights over all states, most of them zero."""
    score_NHK = torch.einsum("nhd,nkd->nhk", query_NHD, state_MD[index_NK])
    weight_NHK = score_NHK.exp() * keep_NK[:, None]
    weight_NHK = weight_NHK / weight_NHK.sum(2, keepdim=True).clamp(min=1e-300)
    return torch.einsum("nhk,nkd->nhd", weight_NHK, state_MD[index_NK]), weight_NHK.sum(2)


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_every_way_to_attend_to_neighbours_is_the_dense_one(heads, threads):
    query, state, index, keep = neighbor_inputs(heads)
    wanted = dense(query, state, index, keep)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 2e-6)):  # the compiled loop is for float32
        found = neighbor_attention(query.to(dtype), state.to(dtype), index, keep)
        assert [part.dtype for part in found] == [dtype] * 2
        for one, other in zip(found, wanted):
            assert (one - other).abs().max() < close
        assert not found[0][3].any()


def test_states_of_half_precision_are_read_as_they_are():
    query, state, index, keep = neighbor_inputs(2)
    found = neighbor_attention(query.float(), state.half(), index, keep)
    wanted = dense(query, state.half().double(), index, keep)
    assert (found[0] - wanted[0]).abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_slopes(chunk, dropout, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_NUMBERS", chunk)
    query, state, index, keep = neighbor_inputs(2, count=4, k=3, states=5, dim=3)
    leaves = [query.requires_grad_(), state.requires_grad_()]

    def neighbors(query, state):
        torch.manual_seed(0)
        return neighbor_attention(query, state, index, keep, dropout)

    assert torch.autograd.gradcheck(neighbors, leaves)
    source = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 2], [2, 2, 2]])
    has = torch.tensor([[False, True, True], [True, True, True], [True, True, False], [False, True, False]])
    leaves = [rows(count, 2, 3, seed=seed).requires_grad_() for seed, count in ((1, 4), (2, 3), (3, 3))]

    def banded(query, key, value):
        torch.manual_seed(0)
        return banded_attention(query, key, value, source, has, dropout)

    assert torch.autograd.gradcheck(banded, leaves)


def test_weights_are_dropped_at_the_rate_and_the_rest_grows():
    query, state, index, keep = neighbor_inputs(4, count=400, k=30)
    torch.manual_seed(0)
    _, sums = neighbor_attention(query * 0, state, index, keep, dropout=0.25)
    counts_N = keep.sum(1)
    kept = sums * counts_N[:, None] * 0.75  # of equal weights
    assert torch.allclose(kept, kept.round())
    assert abs(float(kept.sum() / (4 * counts_N.sum())) - 0.75) < 0.01
