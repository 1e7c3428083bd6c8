"""Visibility rules among the positions of a batch, and the blocks of the batch they leave to be computed.

Shapes: N positions of a batch in order, segment after segment; M positions as memories; R rows and W columns of a part.
A segment is a row of the batch. A rule is three booleans, and comes to this: position n sees the memories from
``first[n]`` up to ``past[n]``, and those from ``later[n]`` on.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisibleRanges:
    """Memories that each position sees: ``first <= m < past`` or ``m >= later``."""

    first_N: Tensor
    past_N: Tensor
    later_N: Tensor

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """bool (R, W), True where the position of the row sees the memory of the column."""
        m_W = torch.arange(columns.start, columns.stop, device=self.first_N.device)
        first_R1, past_R1, later_R1 = (x[rows, None] for x in (self.first_N, self.past_N, self.later_N))
        return ((m_W >= first_R1) & (m_W < past_R1)) | (m_W >= later_R1)


@dataclass(frozen=True)
class Strip:
    """Consecutive positions (rows) and the range of memories (columns) that any of them sees."""

    start: int
    end: int
    low: int
    high: int
    mixed: tuple[int, int]
    """Columns that not all rows see; all rows see every other column."""
    causal: bool = False
    """True if the mixed columns are the rows themselves and each row sees those before it."""

    @property
    def rows(self) -> slice:
        """The positions."""
        return slice(self.start, self.end)

    @property
    def columns(self) -> slice:
        """The memories."""
        return slice(self.low, self.high)

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.end - self.start

    def pieces(self, step: int) -> Iterator[tuple[slice, slice]]:
        """Blocks (rows, columns) that hold everything seen; blocks above the diagonal, where no row sees, are skipped.

        Args:
            step: width of the stairs that follow the diagonal.
        """
        if not self.causal:
            yield self.rows, self.columns
            return
        left = self.low
        for top in range(self.start, self.end, step):
            right = min(top + step, self.end)
            yield slice(top, self.end), slice(left, right)
            left = right


@dataclass(frozen=True)
class VisibilityRule:
    """Visibility between two positions."""

    own_past: bool
    """A position sees the positions before it in its segment."""
    earlier: bool
    """It sees the segments before its own."""
    later: bool
    """It sees the segments after its own."""

    def visible(self, lengths: Sequence[int], device: torch.device | str | None = None) -> VisibleRanges:
        """The rule for segments of these lengths."""
        lengths_S = torch.tensor(lengths, dtype=torch.int64, device=device)
        ends_S = lengths_S.cumsum(0)
        num = int(sum(lengths))
        end_N = ends_S.repeat_interleave(lengths_S, output_size=num)
        start_N = (ends_S - lengths_S).repeat_interleave(lengths_S, output_size=num)
        past_N = torch.arange(num, device=device) if self.own_past else start_N
        first_N = torch.zeros_like(start_N) if self.earlier else start_N
        return VisibleRanges(first_N, past_N, end_N if self.later else torch.full_like(end_N, num))

    def mask(self, lengths: Sequence[int]) -> Tensor:
        """The whole rule, bool (N, N); for small batches."""
        every = slice(0, sum(lengths))
        return self.visible(lengths).mask(every, every)

    def strips(self, lengths: Sequence[int], max_rows: int) -> Iterator[Strip]:
        """All positions, cut into strips, each with the columns it needs (there may be none)."""
        spans = list(_spans(lengths))
        num = sum(lengths)
        if not self.earlier and not self.later:
            for low, end in spans:
                for start, stop in _even_cuts(low, end, max_rows):
                    high = stop if self.own_past else low
                    yield Strip(start, stop, low, high, (min(start, high), high), causal=self.own_past)
            return
        starts = [low for low, _ in spans]
        for start, stop in _even_cuts(0, num, max_rows):
            first = spans[bisect.bisect_right(starts, start) - 1]
            last = spans[bisect.bisect_right(starts, stop - 1) - 1]
            yield self._strip(start, stop, first, last, num)

    def _strip(self, start: int, stop: int, first: tuple[int, int], last: tuple[int, int], num: int) -> Strip:
        """The columns that rows from segment ``first`` to segment ``last`` need."""
        high = num if self.later and first[1] < num else stop if self.own_past else last[0]
        low = 0 if self.earlier else first[0]
        if first == last and not self.own_past and low == first[0]:
            low = min(last[1], high)  # nothing before the segment, and not the segment itself
        mixed_low = low if not self.earlier else start if self.own_past else first[0]
        mixed_low = min(max(mixed_low, low), high)
        mixed_high = max(mixed_low, last[1]) if high == num else high
        one_sided = high == stop and (first == last or not self.later)
        causal = self.own_past and one_sided and (mixed_low, mixed_high) == (start, stop)
        return Strip(start, stop, low, high, (mixed_low, mixed_high), causal)


LOCAL = VisibilityRule(own_past=True, earlier=False, later=False)
"""My own past: TRIME's local memory."""
LONG = VisibilityRule(own_past=True, earlier=True, later=False)
"""My own past and the segments before mine, which are the text before mine: TRIME's long-term memory."""
EXTERNAL = VisibilityRule(own_past=True, earlier=True, later=True)
"""My own past and every other segment: TRIME's external memory in training."""
ELSEWHERE = VisibilityRule(own_past=False, earlier=True, later=True)
"""Every other segment only: external memory with the local one dropped."""


@dataclass(frozen=True)
class SegmentStrip:
    """Consecutive positions against the segments before their own: each pair of segments is in one strip only."""

    spans: tuple[tuple[int, int, int], ...]
    """Start, end and segment start of positions of the same segment; these see the memories before the last."""

    @property
    def rows(self) -> slice:
        """The positions."""
        return slice(self.spans[0][0], self.spans[-1][1])

    @property
    def width(self) -> int:
        """Memories that any of them sees; the first is memory 0."""
        return self.spans[-1][2]

    def pieces(self, step: int) -> Iterator[tuple[slice, slice]]:
        """As :meth:`Strip.pieces`, in stairs at least ``step`` wide."""
        left, top = 0, self.rows.start
        for start, _, right in self.spans:
            if right - left >= step or left == 0 or right == self.width > left:
                yield slice(min(top, start), self.rows.stop), slice(left, right)
                left, top = right, self.rows.stop
            else:
                top = min(top, start)


def segment_strips(lengths: Sequence[int], max_rows: int) -> Iterator[SegmentStrip]:
    """All positions that have segments before theirs. Short segments share a strip; a long one is cut."""
    group: list[tuple[int, int, int]] = []
    for low, end in _spans(lengths):
        for start, stop in _even_cuts(low, end, max_rows) if low else ():
            if group and stop - group[0][0] > max_rows:
                yield SegmentStrip(tuple(group))
                group = []
            group.append((start, stop, low))
    if group:
        yield SegmentStrip(tuple(group))


def _spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each segment; empty ones are passed over."""
    ends = itertools.accumulate(lengths)
    return ((end - length, end) for length, end in zip(lengths, ends) if length)


def _even_cuts(start: int, end: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut a range into the fewest parts not longer than ``longest``, of about equal length."""
    parts = -(-(end - start) // longest)
    bounds = [start + (end - start) * part // max(parts, 1) for part in range(parts + 1)]
    return zip(bounds, bounds[1:])
