"""Cases of exact search by candidates that a device collects, against the CPU's search and float64.

``ATTACH`` says how an index gets its device: by PyTorch's operations in place of the kernel, or, when this runs as a
program under TRITON_INTERPRET=1, by the kernel. The program prints each case with "right" or its traceback, as JSON.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from brute_force import similarities
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.exact import gpu
from fairseq.memory.index.exact.candidates import TrueScores
from fairseq.memory.index.exact.gpu import ExactGpuSearch, slack
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric, Neighbors

ROWS, DIM, BLOCK = 530, 37, 200
DELETED = np.array([3, 199, 200, 529])


def plain_collect(query, key, scale, bias, threshold, first_row, filled, score_NC, row_NC) -> None:
    """``triton_kernels.collect`` by way of the matrix of scores, appended from the last row to the first."""
    scores = query @ key.float().T * scale + bias
    for n in range(len(query)):
        place = (scores[n] >= threshold[n]).nonzero()[:, 0].flip(0)
        start = int(filled[n])
        filled[n] += len(place)
        place = place[: max(0, score_NC.shape[1] - start)]
        score_NC[n, start : start + len(place)] = scores[n, place]
        row_NC[n, start : start + len(place)] = place + first_row


def attach_plain(index: ExactIndex, resident_bytes: int = 0) -> None:
    index._by_gpu = ExactGpuSearch(
        index.keys,
        index.metric,
        index.deleted,
        torch.device("cpu"),
        memory_bytes=index.memory_bytes,
        resident_bytes=resident_bytes,
        collect=plain_collect,
    )


def attach_kernel(index: ExactIndex, resident_bytes: int = 0) -> None:
    index.use_gpus("cpu", resident_bytes=resident_bytes)
    assert index._by_gpu is not None


ATTACH: Callable[..., None] = attach_plain


def drawn(rows: int, seed: int, dim: int = DIM) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@contextmanager
def left_to_the_cpu() -> Iterator[list[int]]:
    """How many queries each search on the CPU gets."""
    counts: list[int] = []
    search = ExactIndex._search_on_cpu

    def spy(self: ExactIndex, query_ND: Tensor, *rest: object) -> None:
        counts.append(len(query_ND))
        search(self, query_ND, *rest)

    with mock.patch.object(ExactIndex, "_search_on_cpu", spy), mock.patch.object(gpu, "_BLOCK_ROWS", BLOCK):
        yield counts


def same_bits(ours: Neighbors, theirs: Neighbors) -> None:
    assert torch.equal(ours.ids_NK, theirs.ids_NK)
    assert torch.equal(ours.scores_NK.view(torch.int32), theirs.scores_NK.view(torch.int32))


def check(
    keys, metric: Metric, query_ND: Tensor, k: int, *, deleted=DELETED, left: int = 0, memory_bytes: int = 1 << 30
) -> Neighbors:
    """The same bits as the CPU's, with this many queries left to it."""
    index = ExactIndex(keys, metric, deleted=deleted, memory_bytes=memory_bytes)
    with left_to_the_cpu() as counts:
        ATTACH(index)
        ours = index.search(query_ND, k)
    assert sum(counts) == left, counts
    assert index._by_gpu is not None, "the device failed"
    same_bits(ours, ExactIndex(keys, metric, deleted=deleted).search(query_ND, k))
    return ours


def metric_and_type(metric: Metric, dtype: torch.dtype) -> None:
    keys, queries = drawn(ROWS, 1).to(dtype), drawn(19, 2)
    found = check(keys, metric, queries, 5)
    alike = similarities(metric, queries.numpy(), keys.float().numpy())
    alike[:, DELETED] = -np.inf
    best = np.argsort(-alike, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.ids_NK.numpy(), best)
    np.testing.assert_allclose(found.scores_NK.numpy(), np.take_along_axis(alike, best, 1), rtol=1e-4, atol=1e-4)


def other_types() -> None:
    check(drawn(ROWS, 1).double(), Metric.L2, drawn(4, 2), 5)


def one_neighbour() -> None:
    for metric in Metric:
        check(drawn(ROWS, 3), metric, drawn(7, 4), 1)


def more_than_a_block() -> None:
    check(drawn(ROWS, 3), Metric.L2, drawn(7, 4), BLOCK + 50)
    check(drawn(ROWS, 3), Metric.IP, drawn(2, 4), ROWS - len(DELETED))


def few_rows() -> None:
    check(drawn(3, 3), Metric.IP, drawn(2, 4), 3, deleted=None)


def many_queries_of_one_key_width() -> None:
    """Several tiles of queries and of columns."""
    check(drawn(ROWS, 3, 80), Metric.COS, drawn(70, 4, 80), 9)


def bulks() -> None:
    check(drawn(ROWS, 3), Metric.IP, drawn(5, 4), 4, memory_bytes=1)


def no_queries() -> None:
    check(drawn(ROWS, 3), Metric.IP, drawn(0, 4), 4)


def ties() -> None:
    """Each key comes ten times, in several blocks: of equals the lower rows are found."""
    keys = drawn(53, 5).repeat(10, 1)
    for metric in Metric:
        check(keys, metric, drawn(6, 6), 25)


def more_ties_than_room() -> None:
    """Two queries are nearest to a key that comes 900 times, more often than a query has room for candidates."""
    keys, queries = torch.cat([drawn(300, 7), drawn(1, 8).repeat(900, 1)]), drawn(6, 9)
    queries[[1, 4]] = keys[-1]
    queries[[0, 2, 3, 5]] -= 3 * keys[-1]
    check(keys, Metric.L2, queries, 3, left=2)


def rising_lengths() -> None:
    """The slack grows after thresholds were raised by the keys before."""
    keys = drawn(ROWS, 10) * torch.logspace(0, 4, ROWS)[:, None]
    for metric in Metric:
        check(keys, metric, drawn(6, 11), 5)


def far_from_the_origin() -> None:
    for metric in Metric:
        check(drawn(ROWS, 10) + 50, metric, drawn(6, 11) + 50, 5)


def short_keys() -> None:
    """For L2 most are equally near to a query; a query of zeros has no nearest key by any other metric."""
    keys, queries = drawn(ROWS, 12) * torch.logspace(-30, 0, ROWS)[:, None], drawn(6, 11)
    keys[7], queries[2] = 0, 0
    check(keys, Metric.L2, queries, 5, left=6)
    for metric in (Metric.IP, Metric.COS):
        check(keys, metric, queries, 5, left=1)


def extreme_queries() -> None:
    queries = drawn(6, 13)
    queries[1, 3], queries[2, 0], queries[4] = torch.inf, torch.nan, 1e18
    for metric in (Metric.L2, Metric.IP):
        found = check(drawn(ROWS, 12), metric, queries, 5, left=1)
        assert (found.ids_NK[1:3] == -1).all()
        assert (found.scores_NK[1:3] == -torch.inf).all()


def long_keys() -> None:
    keys = drawn(ROWS, 12)
    keys[40] = 1e18
    check(keys, Metric.L2, drawn(6, 13), 5, left=6)


def deleted_keys_that_are_not_finite() -> None:
    """They change nothing; compared with float64."""
    keys, queries = drawn(ROWS, 12), drawn(6, 13)
    alike = similarities(Metric.L2, queries.numpy(), keys.numpy())
    alike[:, DELETED] = -np.inf
    keys[3], keys[199, 5] = torch.nan, torch.inf
    index = ExactIndex(keys, Metric.L2, deleted=DELETED)
    with left_to_the_cpu() as counts:
        ATTACH(index)
        found = index.search(queries, 5)
    assert not counts
    np.testing.assert_array_equal(found.ids_NK.numpy(), np.argsort(-alike, axis=1, kind="stable")[:, :5])


def mapped_chunks() -> None:
    """Files that are read by explicit requests, cut elsewhere than blocks."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for number, part in enumerate(drawn(450, 14).half().numpy()):
            if number % 150 == 0:
                parts.append([])
            parts[-1].append(part)
        chunks = []
        for number, part in enumerate(parts):
            path = Path(folder) / str(number)
            np.stack(part).tofile(path)
            chunks.append(np.memmap(path, np.float16, "r", shape=(len(part), DIM)))
        check(ChunkedArray(chunks, exceeds_ram=True), Metric.IP, drawn(6, 15), 5, deleted=np.array([0, 449]))


def keys_that_stay() -> None:
    keys = drawn(ROWS, 16)
    index = ExactIndex(keys, Metric.L2, deleted=DELETED)
    with left_to_the_cpu() as counts:
        ATTACH(index, resident_bytes=keys.nbytes)
        index.search(drawn(6, 17), 5)
        with mock.patch.object(ChunkedArray, "block", side_effect=AssertionError("read again")):
            ours = index.search(drawn(6, 18), 5)
    assert not counts
    same_bits(ours, ExactIndex(keys, Metric.L2, deleted=DELETED).search(drawn(6, 18), 5))


def collected() -> None:
    """Exactly the keys that reach a threshold are appended; what there is no room for is counted, and not written."""
    queries, keys = drawn(70, 19), drawn(300, 20)
    scale, bias = torch.linspace(0.5, 2, 300), drawn(1, 21, 300)[0]
    bias[17] = -torch.inf
    scores = (queries.double() @ keys.double().T) * scale + bias
    # Halfway between two scores, so that no rounding decides.
    ordered = scores.sort(1, descending=True).values
    threshold = ((ordered[:, 29] + ordered[:, 30]) / 2).float()
    threshold[5] = torch.inf
    filled, score_NC = torch.full((70,), 2, dtype=torch.int32), torch.full((70, 40), 7.0)
    row_NC = torch.full((70, 40), -5)
    index = ExactIndex(keys)
    ATTACH(index)
    collect = index._by_gpu._collect
    big = 1 << 40
    collect(queries, keys, scale, bias, threshold, big, filled, score_NC, row_NC)
    assert filled.tolist() == [2 if n == 5 else 32 for n in range(70)]
    for n in range(70):
        count = int(filled[n])
        expected = [] if n == 5 else sorted((big + scores[n].topk(30).indices).tolist())
        assert sorted(row_NC[n, 2:count].tolist()) == expected
        torch.testing.assert_close(
            score_NC[n, 2:count].double(), scores[n, row_NC[n, 2:count] - big], rtol=1e-5, atol=1e-5
        )
    collect(queries, keys, scale, bias, threshold, 0, filled, score_NC, row_NC)
    assert filled.tolist() == [2 if n == 5 else 62 for n in range(70)]
    assert (row_NC[:, :2] == -5).all()
    assert (row_NC[5] == -5).all()


def slack_holds() -> None:
    """No score of the device is further from the CPU's than the slack, which is no more than rounding explains."""
    for metric in Metric:
        for far in (0.0, 30.0):
            keys, queries = drawn(ROWS, 22) + far, drawn(8, 23) + far
            queries = normalized(queries) if metric is Metric.COS else queries
            index = ExactIndex(keys, metric)
            ATTACH(index)
            search = index._by_gpu
            assert search is not None
            block = search._prepare(slice(0, ROWS), keys)
            score_NC, row_NC = torch.empty(8, ROWS), torch.empty(8, ROWS, dtype=torch.int64)
            filled, threshold = torch.zeros(8, dtype=torch.int32), torch.full((8,), gpu.LOWEST)
            held = (filled, score_NC, row_NC)
            search._collect(queries, keys, block.scale_M, block.bias_M, threshold, 0, *held)
            assert (filled == ROWS).all()
            device = torch.empty(8, ROWS).scatter_(1, row_NC, score_NC).double()
            rows, ids = np.divmod(np.arange(8 * ROWS), ROWS)
            true = torch.from_numpy(TrueScores(index.keys, metric, queries).pairs(rows, ids)).double().view(8, ROWS)
            if metric is Metric.L2:
                true = (true + queries.double().square().sum(1, keepdim=True)) / 2
            norm = torch.linalg.vector_norm(queries, dim=1)
            bound = slack(norm, block.longest, DIM, metric).double()
            assert ((device - true).abs() <= bound[:, None]).all()
            assert (bound <= 1e-4 * (norm + block.longest).square().clamp(min=1)).all()


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{metric.value} {str(dtype).removeprefix('torch.')}": lambda metric=metric, dtype=dtype: metric_and_type(
            metric, dtype
        )
        for metric in Metric
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    **{
        case.__name__: case
        for case in (
            other_types,
            one_neighbour,
            more_than_a_block,
            few_rows,
            many_queries_of_one_key_width,
            bulks,
            no_queries,
            ties,
            more_ties_than_room,
            rising_lengths,
            far_from_the_origin,
            short_keys,
            extreme_queries,
            long_keys,
            deleted_keys_that_are_not_finite,
            mapped_chunks,
            keys_that_stay,
            collected,
            slack_holds,
        )
    },
}


def verdict(name: str) -> str:
    """A case's "right", or its traceback."""
    try:
        CASES[name]()
    except Exception:
        return traceback.format_exc()
    return "right"


def main() -> None:
    global ATTACH  # noqa: PLW0603
    ATTACH = attach_kernel
    print(json.dumps({name: verdict(name) for name in CASES}))


if __name__ == "__main__":
    main()
