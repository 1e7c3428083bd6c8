"""Exact search on a GPU: candidates by float32 products there, their scores by the CPU's kernel.

Keys go to the GPU block by block, in their own type and ahead of the products; those of a store that fits stay there.
A query keeps the keys whose score reaches a threshold, which rises as keys go by. A threshold is lower than the k-th
best score by the slack that two ways of rounding may differ by, so the k best of the CPU's search are among the
candidates: scored again by its kernel they have the same bits.

Shapes: N queries, M keys of a block, D width, K neighbours, C candidates a query has room for, H candidates of all.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.reading.read_ahead import ReadAhead
from fairseq.memory.types import Array, Metric

logger = logging.getLogger(__name__)

Collect = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]
"""``triton_kernels.collect``."""

LOWEST = -3.0e38
"""A threshold that every key reaches, deleted ones (minus infinity) excepted."""
# A block's keys may all be candidates: 16,384 of them take 192 KB of a query, and 32 MB at a width of 1024 in half
# precision, enough for the transfer's full rate.
_BLOCK_ROWS = 16384
_RESIDENT_SHARE = 0.5  # of the free memory
_CANDIDATE_BYTES = 20  # score, row, and a copy of both, in part, while they are pruned
_LONGEST = 1e17  # squares, and sums of them, stay far from float32's largest number
_SHORTEST = 1e-12  # ``normalized`` divides shorter keys by this
_UNIT = 2.0**-24  # float32's rounding, relative
_TINIEST = 2.0**-126  # products below may be rounded to 0


def slack(query_norm_N: Tensor, key_norm: Tensor, dim: int, metric: Metric) -> Tensor:
    """A bound on the difference of a device's score and the CPU's, (N,), whatever the order of either sum.

    A float32 sum of n rounded terms is off by at most ``g(n) = n u / (1 - n u)`` of the sum of their absolute values,
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1), and two such sums by twice that.
    Scores are q.k, whose absolute values sum up to at most |q| |k|; for L2 half of ``|q|^2 - |q - k|^2``, taken as
    ``q.k - |k|^2 / 2`` here and from the differences there, each at most ``(|q| + |k|)^2 / 2``. For the cosine queries
    have length one; keys are scaled after the product here and before it there, by lengths that are sums themselves.

    Args:
        key_norm: of the longest key.
    """
    # 16 more for the roundings of single steps; a length of the cosine is off by half of what its square is.
    terms = 2 * dim + 16 if metric is Metric.COS else dim + 16
    relative = terms * _UNIT / (1 - terms * _UNIT)
    if metric is Metric.L2:
        size_N = (query_norm_N + key_norm).square()
    elif metric is Metric.IP:
        size_N = 2 * query_norm_N * key_norm
    else:
        size_N = torch.full_like(query_norm_N, 2.0)
    # Lengths are rounded as well, by less than a hundredth.
    return 1.03 * relative * size_N + terms * _TINIEST


@dataclass(frozen=True)
class _Block:
    """Keys on the device; a score is ``query . key * scale + bias``."""

    first_row: int
    key_MD: Tensor
    scale_M: Tensor
    bias_M: Tensor
    """Minus infinity for deleted rows."""
    longest: Tensor
    """Length of the longest key, ()."""
    is_sane: Tensor
    """False where a length is beyond what the slack holds for, ()."""


class ExactGpuSearch:
    """The keys of an exact search as a GPU sees them."""

    def __init__(
        self,
        keys: ChunkedArray,
        metric: Metric,
        deleted: Array,
        device: torch.device,
        *,
        memory_bytes: int,
        resident_bytes: int,
        collect: Collect,
    ) -> None:
        """Args.

        deleted: int64 rows that are never found, ascending.
        memory_bytes: limit on the candidates' memory, on the device and on the CPU.
        resident_bytes: keys of at most this size stay on the device.
        collect: appends candidates.
        """
        self._keys, self._metric, self._deleted, self.device = keys, metric, deleted, device
        self._memory_bytes, self._collect = memory_bytes, collect
        self._stays = keys.nbytes <= resident_bytes
        self._resident: list[_Block] = []
        self._rows = [slice(first, min(first + _BLOCK_ROWS, len(keys))) for first in range(0, len(keys), _BLOCK_ROWS)]

    @classmethod
    def of(
        cls,
        keys: ChunkedArray,
        metric: Metric,
        deleted: Array,
        device: torch.device | str | None = None,
        *,
        memory_bytes: int,
        resident_bytes: int | None = None,
    ) -> ExactGpuSearch | None:
        """A search on a device, by default the current GPU; None, after a line that says why, where the CPU searches.

        Args:
            device: not asked whether it is a GPU: Triton's interpreter takes the CPU.
            resident_bytes: by default half of the device's free memory.
        """
        why = None
        if device is None and not torch.cuda.is_available():
            why = "there is no GPU"
        elif importlib.util.find_spec("triton") is None:
            why = "Triton is not installed"
        if why is not None:
            logger.info("keys are searched on the CPU: %s", why)
            return None
        from fairseq.memory.index.exact.triton_kernels import collect

        device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        if resident_bytes is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            resident_bytes = int(_RESIDENT_SHARE * free)
        return cls(
            keys, metric, deleted, device, memory_bytes=memory_bytes, resident_bytes=resident_bytes, collect=collect
        )

    def search(self, query_ND: Tensor, k: int, ids_NK: Tensor, scores_NK: Tensor) -> Array:
        """Write the k best rows and their scores; the numbers of queries that only the CPU's search can answer.

        Those have more keys about as near as the k-th than there is room for, or they or the keys are so long that
        the slack does not hold.

        Args:
            query_ND: float32, finite, for the cosine of length one.
        Raises: RuntimeError when the device fails.
        """
        from fairseq.memory.index.exact.candidates import TrueScores

        room = 2 * k + 256
        bulk = max(1, self._memory_bytes // (_CANDIDATE_BYTES * (room + _BLOCK_ROWS) + 4 * query_ND.shape[1]))
        left = []
        for first in range(0, len(query_ND), bulk):
            part = slice(first, min(first + bulk, len(query_ND)))
            row_NC, left_N = self._candidates(query_ND[part], k, room)
            left.append(np.flatnonzero(left_N) + first)
            scores = TrueScores(self._keys, self._metric, query_ND[part])
            scores.write_best(row_NC, np.flatnonzero(~left_N), ids_NK[part], scores_NK[part])
        return np.concatenate(left) if left else np.empty(0, np.int64)

    def _candidates(self, query_ND: Tensor, k: int, room: int) -> tuple[Array, Array]:
        """Rows that could be among the k best, ascending, (N, C), -1 after the last; queries that have too many."""
        held = _Held(query_ND.to(self.device), k, room, self._metric)
        for block in self._blocks():
            held.make_room(block)
            held.append(block, self._collect)
        return held.rows()

    def _blocks(self) -> Iterator[_Block]:
        """All keys, in order; the next block is on its way while one is multiplied with."""
        if len(self._resident) == len(self._rows):
            yield from self._resident
            return
        made: list[_Block] = []
        with ReadAhead(self._keys, self._rows) as reader:
            transfer = _Transfer(self.device)
            sent = transfer.send(reader.block(0)) if self._rows else None
            for number, rows in enumerate(self._rows):
                assert sent is not None
                block = self._prepare(rows, transfer.receive(sent))
                if self._stays:
                    made.append(block)
                yield block
                # After the products were started, and before anybody waits for what they found.
                sent = transfer.send(reader.block(number + 1)) if number + 1 < len(self._rows) else None
        self._resident = made

    def _prepare(self, rows: slice, key_MD: Tensor) -> _Block:
        norm_M = torch.linalg.vector_norm(key_MD, dim=1, dtype=torch.float32)
        scale_M, bias_M = torch.ones_like(norm_M), torch.zeros_like(norm_M)
        first, past = np.searchsorted(self._deleted, (rows.start, rows.stop))
        gone = torch.from_numpy(self._deleted[first:past] - rows.start).to(self.device)
        norm_M[gone] = 0.0  # whatever they hold
        is_sane = (norm_M <= _LONGEST).all()
        if self._metric is Metric.L2:
            bias_M = -0.5 * norm_M.square()
        elif self._metric is Metric.COS:
            scale_M = 1 / norm_M.clamp(min=_SHORTEST)
        bias_M[gone] = -torch.inf
        return _Block(rows.start, key_MD, scale_M, bias_M, norm_M.amax(), is_sane)


class _Held:
    """The candidates of some queries, on the device."""

    def __init__(self, query_ND: Tensor, k: int, room: int, metric: Metric) -> None:
        """Args.

        room: the most candidates that a query keeps when it is pruned.
        """
        self._query_ND, self._k, self._room, self._metric = query_ND.contiguous(), k, room, metric
        count, device = len(query_ND), query_ND.device
        self._norm_N = torch.linalg.vector_norm(query_ND, dim=1)
        self._score_NC = torch.empty(count, room + _BLOCK_ROWS, device=device)
        self._row_NC = torch.empty(count, room + _BLOCK_ROWS, dtype=torch.int64, device=device)
        self._filled_N = torch.zeros(count, dtype=torch.int32, device=device)
        # At least k keys have this score on the device.
        self._reached_N = torch.full((count,), -torch.inf, device=device)
        self._longest = torch.zeros((), device=device)
        self._is_sane = torch.ones((), dtype=torch.bool, device=device)
        self._crowded_N = ~(self._norm_N <= _LONGEST)

    def _thresholds(self) -> Tensor:
        """Scores that a key among the k best reaches on the device."""
        # The k best of the device reach their k-th score less the slack on the CPU, and what does so there reaches it
        # less another slack here.
        slack_N = slack(self._norm_N, self._longest, self._query_ND.shape[1], self._metric)
        threshold_N = (self._reached_N - 2 * slack_N).clamp(min=LOWEST)
        return threshold_N.masked_fill(self._crowded_N, torch.inf)

    def make_room(self, block: _Block) -> None:
        """Prune where the block's keys, if all of them were candidates, would not fit."""
        if int(self._filled_N.amax()) + len(block.key_MD) > self._score_NC.shape[1]:
            self._prune()

    def append(self, block: _Block, collect: Collect) -> None:
        """Collect the block's candidates."""
        self._longest = torch.maximum(self._longest, block.longest)
        self._is_sane = self._is_sane & block.is_sane
        held = (self._filled_N, self._score_NC, self._row_NC)
        collect(self._query_ND, block.key_MD, block.scale_M, block.bias_M, self._thresholds(), block.first_row, *held)

    def _prune(self) -> None:
        """Raise the thresholds to the k-th best so far and drop what does not reach them."""
        width = int(self._filled_N.amax())
        if width > self._k:
            at_C = torch.arange(width, device=self._score_NC.device)
            live_NC = self._score_NC[:, :width].masked_fill(at_C >= self._filled_N[:, None], -torch.inf)
            best_NL, place_NL = live_NC.topk(min(width, self._room + 1), dim=1)
            self._reached_N = torch.maximum(self._reached_N, best_NL[:, self._k - 1])
            kept_N = (best_NL >= self._thresholds()[:, None]).sum(1)
            self._crowded_N |= kept_N > self._room
            self._filled_N = kept_N.masked_fill(self._crowded_N, 0).int()
            place_NL = place_NL[:, : self._room]
            self._score_NC[:, : place_NL.shape[1]] = best_NL[:, : self._room]
            self._row_NC[:, : place_NL.shape[1]] = self._row_NC.gather(1, place_NL)

    def rows(self) -> tuple[Array, Array]:
        """As ``ExactGpuSearch._candidates``."""
        self._prune()
        width = max(1, int(self._filled_N.amax()))
        at_C = torch.arange(width, device=self._row_NC.device)
        row_NC = self._row_NC[:, :width].masked_fill(at_C >= self._filled_N[:, None], torch.iinfo(torch.int64).max)
        row_NC = row_NC.sort(1).values
        row_NC = row_NC.masked_fill(row_NC == torch.iinfo(torch.int64).max, -1).cpu()
        # Fewer than k can only be where keys are not sane.
        left_N = self._crowded_N | ~self._is_sane | (self._filled_N < self._k)
        return row_NC.numpy(), left_N.cpu().numpy()


class _Transfer:
    """Blocks on their way to a device, through two pinned buffers and on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        """Args.

        device: may be the CPU, where blocks are taken as they are.
        """
        self._device = device
        new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []
        self._done: list[torch.cuda.Event] = []
        self._count = 0

    def send(self, key_MD: Tensor) -> Tensor:
        """Start a transfer; ``receive`` makes the block usable."""
        if key_MD.dtype is torch.float64:
            key_MD = key_MD.float()
        if self._stream is None:
            return key_MD.contiguous()
        if len(self._buffers) < 2:
            self._buffers.append(torch.empty(key_MD.shape, dtype=key_MD.dtype, pin_memory=True))
            new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
            self._done.append(new_event())
        turn = self._count % 2
        self._count += 1
        self._done[turn].synchronize()  # the buffer's last transfer; an event that was never recorded does not wait
        buffer_MD = self._buffers[turn][: len(key_MD)]
        buffer_MD.copy_(key_MD)
        with torch.cuda.stream(self._stream):
            sent_MD = buffer_MD.to(self._device, non_blocking=True)
            self._done[turn].record(self._stream)
        return sent_MD

    def receive(self, sent_MD: Tensor) -> Tensor:
        """The block, for what the current stream is given next."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            # Its memory is the other stream's: it must not be handed out again while it is multiplied with.
            sent_MD.record_stream(current)
        return sent_MD
