"""An order of vectors in which similar ones are near each other."""

from __future__ import annotations

import pytest
import torch

from fairseq.memory.index.kmeans.halving import nearby_order


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("parts", [1, 2, 8, 1000])
def test_every_vector_has_one_place(rows, parts):
    order_N = nearby_order(torch.randn(rows, 5), parts)
    assert order_N.sort().values.tolist() == list(range(rows))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_vectors_without_a_direction_have_places_too(value):
    rows_ND = torch.full((10, 4), value)
    assert nearby_order(rows_ND, 4).sort().values.tolist() == list(range(10))


def test_clusters_come_one_after_the_other():
    draw = torch.Generator().manual_seed(0)
    centre_CD = 10 * torch.randn(8, 16, generator=draw)
    cluster_N = torch.randint(0, 8, (64,), generator=draw).sort().values.repeat(5)[torch.randperm(320, generator=draw)]
    rows_ND = centre_CD[cluster_N] + torch.randn(320, 16, generator=draw)
    changes = int((cluster_N[nearby_order(rows_ND, 64)].diff() != 0).sum())
    assert changes <= 24  # 7 at best, 280 in an order by chance
