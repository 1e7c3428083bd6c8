"""k-means against brute force in float64 and against faiss's."""

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.kmeans import kmeans as module
from fairseq.memory.index.kmeans.kmeans import Assigner, assign, inertia, kmeans, sample_size
from fairseq.memory.types import Metric

DIM = 24


def made(rows: int, seed: int) -> torch.Tensor:
    """Clustered rows with one column that outweighs the others, as hidden states have."""
    rng = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(7).standard_normal((40, DIM))
    rows_ND = centers[rng.integers(0, 40, rows)] + rng.standard_normal((rows, DIM))
    rows_ND[:, 3] = 50 * rows_ND[:, 3] + 200
    return torch.from_numpy(rows_ND.astype(np.float32))


KEYS = made(3000, 0)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_every_key_gets_the_centroid_that_brute_force_finds(metric, products, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 1000)
    centroids = made(150, 1)
    product = KEYS.double() @ centroids.double().T
    truth = product - 0.5 * centroids.double().square().sum(1) if metric is Metric.L2 else product
    near = assign(KEYS, centroids, metric)
    assert near.dtype == torch.int64
    found, best = truth.gather(1, near[:, None])[:, 0], truth.amax(1)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=0.0)
    assert (near == truth.argmax(1)).float().mean() > 0.999


def test_few_centroids_and_no_keys():
    assert assign(KEYS, KEYS[:1]).tolist() == [0] * len(KEYS)
    assert assign(KEYS[:0], KEYS[:2]).tolist() == []
    assert assign(KEYS[:1].half(), KEYS[:9]).tolist() == [0]
    twice = torch.cat([KEYS[:5], KEYS[:5]])
    assert assign(KEYS[:5], twice).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"centroids of shape \(0, 24\); give at least one row"):
        Assigner(KEYS[:0])


def test_clusters_are_as_tight_as_those_of_faiss(products):
    ours, theirs = [], []
    for seed in range(3):  # where both start is chance
        centroids = kmeans(KEYS, 60, seed=seed, iterations=12)
        ours.append(inertia(KEYS, centroids, assign(KEYS, centroids)))
        reference = faiss.Kmeans(DIM, 60, niter=12, seed=seed, min_points_per_centroid=1)
        reference.train(KEYS.numpy())
        found = torch.from_numpy(reference.centroids)
        theirs.append(inertia(KEYS, found, assign(KEYS, found)))
    assert np.mean(ours) < 1.03 * np.mean(theirs)


def test_inertia_is_the_mean_squared_distance():
    centroids = KEYS[:10]
    truth = torch.cdist(KEYS.double(), centroids.double()).square().amin(1).mean()
    assert inertia(KEYS, centroids, assign(KEYS, centroids)) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.COS])
def test_same_seed_same_bits_on_any_number_of_threads(metric):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(kmeans(KEYS, 130, seed=5, metric=metric))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert not torch.equal(results[0], kmeans(KEYS, 130, seed=6, metric=metric))
    if metric is Metric.COS:
        torch.testing.assert_close(torch.linalg.vector_norm(results[0], dim=1), torch.ones(130))


def test_no_cluster_stays_empty():
    """Equal keys: all but one of the clusters that start on them lose every key."""
    keys = torch.cat([KEYS[:1].expand(500, DIM), KEYS[1:200]])
    centroids = kmeans(keys, 100, seed=0, iterations=15)
    used = torch.bincount(assign(keys, centroids), minlength=100)
    assert (used > 0).sum() >= 90
    torch.testing.assert_close(kmeans(keys[:50], 10, seed=0), keys[:1].expand(10, DIM))  # nothing else is there


def test_samples_and_impossible_numbers():
    assert sample_size(10**9, 100, 10**6) == 25_600
    assert sample_size(5000, 100, 10**6) == 5000
    assert sample_size(10**9, 4096, 500_000) == 500_000
    for count in (0, 3001):
        with pytest.raises(ValueError, match=f"{count} clusters of 3000 keys; give 1 to 3000"):
            kmeans(KEYS, count, seed=1)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_nearest_centroids_are_those_of_comparing_all(metric, count, threads, products):
    draw = torch.Generator().manual_seed(count)
    centroids_CD, keys_ND = torch.randn(40, 24, generator=draw), 3 * torch.randn(500, 24, generator=draw)
    centroids_CD[7] = centroids_CD[3]  # of equals the first
    scores_NC = keys_ND.double() @ centroids_CD.double().T
    if metric is Metric.L2:
        scores_NC = -torch.cdist(keys_ND.double(), centroids_CD.double(), compute_mode="donot_use_mm_for_euclid_dist")
    best_NP = scores_NC.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(Assigner(centroids_CD, metric).nearest(keys_ND, count), best_NP)


def test_keys_that_are_not_finite_or_far_longer_than_others_have_no_nearest_centroids():
    keys_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    keys_ND[3, 0], keys_ND[5, 1], keys_ND[9] = torch.nan, torch.inf, 1e9
    near_NP = Assigner(torch.randn(10, 8)).nearest(keys_ND, 4)
    assert (near_NP < 0).any(1).nonzero()[:, 0].tolist() == [3, 5, 9]
    assert (near_NP[[3, 5, 9]] == -1).all()
