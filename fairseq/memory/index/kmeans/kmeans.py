"""k-means, and the nearest of some centroids, for the lists of an index and RetoMaton's clusters.

Nearly all of its time goes into products of keys and centroids. Where the CPU multiplies 8-bit integers fast,
they are taken of rounded keys, whose error is bounded (``bounded_scores``); centroids that may still be the nearest are
compared again in float32, so that the answer is that of full precision.

Shapes: N keys, C centroids, D width, Q keys of a group.
"""

from __future__ import annotations

import functools
import itertools
import logging

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.ops import products as ways
from fairseq.memory.index.ops.bounded_scores import KeyBlock, RoundedQueries
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric
from fairseq.runtime.threads import ThreadBuffer, run_in_threads

logger = logging.getLogger(__name__)

ROWS_PER_CENTROID = 256
"""More keys than this for each centroid make the centroids no better."""
_BLOCK_ROWS = 16_384
_GROUP_SCORES = 512 << 10  # of a group of keys with all centroids: 2 MB, which stay in the CPU's cache
_GPU_SCORES = 64 << 20
_NEAR_ROWS, _FAR = 4096, 1e4
_CLUSTERS_PER_TASK = 64


class Assigner:
    """Finds the nearest of some centroids for any keys: by L2, or by inner product for the other metrics.

    Of centroids that are equally near, to the last bit of float32, it is the first.
    """

    def __init__(self, centroids_CD: Tensor, metric: Metric = Metric.L2, device: str | torch.device = "cpu") -> None:
        """Args.

        device: where the products are computed; keys are given and answers are returned in RAM.
        Raises: ValueError without a centroid.
        """
        if centroids_CD.ndim != 2 or not len(centroids_CD):
            raise ValueError(f"centroids of shape {tuple(centroids_CD.shape)}; give at least one row")
        self.centroids_CD = centroids_CD.detach().float().cpu().contiguous()
        self.by_distance = metric is Metric.L2
        self._device = torch.device(device)

    def __call__(self, keys_ND: Tensor) -> Tensor:
        """Number of each key's centroid, (N,) int64."""
        near_N = torch.empty(len(keys_ND), dtype=torch.int64)
        for start in range(0, len(keys_ND), _BLOCK_ROWS):
            block_ND = keys_ND[start : start + _BLOCK_ROWS].float().contiguous()
            rows = slice(start, start + len(block_ND))
            if self._device.type == "cpu":
                self.assign_block(block_ND, self.rounded(block_ND), near_N[rows])
            else:
                near_N[rows] = self._on_device(block_ND)
        return near_N

    def rounded(self, block_ND: Tensor) -> RoundedQueries:
        """A block of keys as they are multiplied, by other centroids as well."""
        products = ways.for_width(ways.chosen(), block_ND.shape[1])
        return RoundedQueries(block_ND, self.centroids_CD, products, by_distance=self.by_distance)

    def assign_block(self, block_ND: Tensor, keys: RoundedQueries, near_N: Tensor) -> None:
        """Write the numbers of the centroids nearest to keys that were rounded."""
        block = keys.block(self.centroids_CD)
        count, columns = len(block_ND), block.columns
        size = max(1, min(_GROUP_SCORES // columns, -(-count // torch.get_num_threads())))
        buffer = ThreadBuffer(size * columns, keys.products.raw_dtype)
        scan = functools.partial(self._scan, block_ND, keys, block, buffer, near_N)
        run_in_threads(scan, [slice(at, min(at + size, count)) for at in range(0, count, size)])

    def _scan(
        self, block_ND: Tensor, keys: RoundedQueries, block: KeyBlock, buffer: ThreadBuffer, near_N: Tensor, rows: slice
    ) -> None:
        from fairseq.memory.index.kmeans import kernels

        raw_QM = buffer(rows.stop - rows.start, block.columns)
        keys.raw_scores(block, rows, raw_QM)
        raw = (raw_QM.float() if raw_QM.is_floating_point() else raw_QM).numpy()
        keys_QD, centroids_CD, near_Q = (x.numpy() for x in (block_ND[rows], self.centroids_CD, near_N[rows]))
        about = (keys.about_N4[rows], tuple(block.about_5M))
        kernels.nearest(raw, *about, keys_QD, centroids_CD, near_Q, self.by_distance)

    def nearest(self, keys_ND: Tensor, count: int) -> Tensor:
        """Numbers of the ``count`` centroids nearest to each key, int64 (N, count), nearest first.

        -1 where scores cannot be told, or bounded: in rows of keys that are not finite, or far longer than the others.
        """
        keys_ND, near_NP = keys_ND.float().contiguous(), torch.empty((len(keys_ND), count), dtype=torch.int64)
        length_N = torch.linalg.vector_norm(keys_ND, dim=1)
        is_odd_N = ~(length_N <= _FAR * length_N.nanmedian())
        keys_ND = keys_ND.masked_fill(is_odd_N[:, None], 0.0) if is_odd_N.any() else keys_ND
        size = max(1, min(_NEAR_ROWS, -(-len(keys_ND) // torch.get_num_threads())))
        run_in_threads(
            lambda at: self._write_nearest(keys_ND[at : at + size], near_NP[at : at + size]),
            range(0, len(keys_ND), size),
        )
        near_NP[is_odd_N] = -1
        return near_NP

    def _write_nearest(self, block_ND: Tensor, near_NP: Tensor) -> None:
        from fairseq.memory.index.kmeans import kernels
        from fairseq.memory.index.ops.kernels import NOTHING

        keys = self.rounded(block_ND)
        block = keys.block(self.centroids_CD)
        size = max(1, _GROUP_SCORES // block.columns)
        raw_QM = torch.empty(size, block.columns, dtype=keys.products.raw_dtype)
        packed_QC = np.empty((size, len(self.centroids_CD) + 1), np.int64)
        for at in range(0, len(block_ND), size):
            rows = slice(at, min(at + size, len(block_ND)))
            own_QM, own_QC = raw_QM[: rows.stop - at], packed_QC[: rows.stop - at]
            keys.raw_scores(block, rows, own_QM)
            raw = (own_QM.float() if own_QM.is_floating_point() else own_QM).numpy()
            about, vectors = tuple(block.about_5M), (block_ND[rows].numpy(), self.centroids_CD.numpy())
            wanted = near_NP.shape[1]
            most = kernels.pack_nearest(raw, keys.about_N4[rows], about, *vectors, self.by_distance, wanted, own_QC)
            own_QC[:, :most].sort(axis=1)
            best_QP = torch.from_numpy(own_QC[:, :wanted])
            near_NP[rows] = torch.where(best_QP == int(NOTHING), -1, best_QP & 0xFFFFFFFF)

    def _on_device(self, block_ND: Tensor) -> Tensor:
        centroids_CD = self.centroids_CD.to(self._device)
        offset_C = -0.5 * centroids_CD.square().sum(1) if self.by_distance else centroids_CD.new_zeros(())
        parts = torch.split(block_ND, max(1, _GPU_SCORES // len(centroids_CD)))
        nearest = [torch.addmm(offset_C, part.to(self._device), centroids_CD.T).argmax(1).cpu() for part in parts]
        return torch.cat(nearest) if nearest else torch.empty(0, dtype=torch.int64)


def assign(keys_ND: Tensor, centroids_CD: Tensor, metric: Metric = Metric.L2) -> Tensor:
    """Number of the centroid nearest to each key, (N,) int64; see :class:`Assigner`."""
    return Assigner(centroids_CD, metric)(keys_ND)


def sample_size(num_rows: int, num_clusters: int, limit: int) -> int:
    """Number of keys that k-means should be trained on: enough for the centroids and no more."""
    return min(num_rows, limit, ROWS_PER_CENTROID * num_clusters)


def kmeans(
    keys_ND: Tensor | Array,
    num_clusters: int,
    *,
    seed: int,
    iterations: int = 10,
    metric: Metric = Metric.L2,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Centroids of clusters of keys, (C, D) float32 (Lloyd's algorithm, started at keys drawn by chance).

    The result is the same for the same seed, whatever the number of threads. With a metric other than L2 a key belongs
    to the centroid of largest inner product, and centroids have length one.

    Args:
        keys_ND: of any floating type, finite; a sample of :func:`sample_size` rows is enough.
        iterations: at most; it ends when no key changes its cluster.
        device: where distances are computed.
    Raises: ValueError when there are fewer keys than clusters.
    """
    keys_ND = torch.as_tensor(keys_ND).detach().cpu().float().contiguous()
    if not 1 <= num_clusters <= len(keys_ND):
        raise ValueError(f"{num_clusters} clusters of {len(keys_ND)} keys; give 1 to {len(keys_ND)}")
    draw = np.random.default_rng(seed)
    centroids_CD = keys_ND[torch.from_numpy(np.sort(draw.choice(len(keys_ND), num_clusters, replace=False)))]
    if metric is not Metric.L2:
        centroids_CD = normalized(centroids_CD)
    on_cpu = torch.device(device).type == "cpu"
    starts = range(0, len(keys_ND), _BLOCK_ROWS)
    blocks = [keys_ND[start : start + _BLOCK_ROWS] for start in starts]
    # The rounded keys are made once and serve every iteration.
    rounded = [Assigner(centroids_CD, metric).rounded(block) for block in blocks] if on_cpu else []
    before_N = torch.full((len(keys_ND),), -1)
    for done in range(iterations):
        assigner = Assigner(centroids_CD, metric, device)
        near_N = torch.empty_like(before_N)
        if on_cpu:
            for block, keys, out in zip(blocks, rounded, torch.split(near_N, _BLOCK_ROWS)):
                assigner.assign_block(block, keys, out)
        else:
            near_N = assigner(keys_ND)
        changed = int((near_N != before_N).sum())
        logger.debug("k-means iteration %d: %d of %d keys changed their cluster", done + 1, changed, len(keys_ND))
        if not changed:
            break
        before_N = near_N
        centroids_CD = _means(keys_ND, near_N, num_clusters, draw)
        if metric is not Metric.L2:
            centroids_CD = normalized(centroids_CD)
    return centroids_CD


def inertia(keys_ND: Tensor, centroids_CD: Tensor, near_N: Tensor) -> float:
    """Mean squared distance of the keys from their centroids."""
    total = 0.0
    for keys, nearest in zip(torch.split(keys_ND, _BLOCK_ROWS), torch.split(near_N, _BLOCK_ROWS)):
        total += float((keys.float() - centroids_CD[nearest]).square().sum(1).double().sum())
    return total / max(1, len(keys_ND))


def _means(keys_ND: Tensor, near_N: Tensor, num_clusters: int, draw: np.random.Generator) -> Tensor:
    """Mean of each cluster. An empty one is put on a key of one of the largest, which it then shares."""
    from fairseq.memory.index.kmeans import kernels

    order_N = near_N.argsort(stable=True)
    counts_C = torch.bincount(near_N, minlength=num_clusters)
    edges = torch.cat([counts_C.new_zeros(1), counts_C.cumsum(0)])
    means_CD = torch.empty(num_clusters, keys_ND.shape[1])

    def sum_up(first: int) -> None:
        past = min(first + _CLUSTERS_PER_TASK, num_clusters)
        arrays = (keys_ND, order_N, edges[first : past + 1], means_CD[first:past])
        kernels.means(*(x.numpy() for x in arrays))

    run_in_threads(sum_up, range(0, num_clusters, _CLUSTERS_PER_TASK))
    empty = (counts_C == 0).nonzero()[:, 0].tolist()
    largest = counts_C.argsort(descending=True, stable=True)[: int((counts_C > 1).sum())].tolist()
    for number, donor in zip(empty, itertools.cycle(largest)):
        low, high = int(edges[donor]), int(edges[donor + 1])
        means_CD[number] = keys_ND[order_N[int(draw.integers(low, high))]]
    return means_CD
