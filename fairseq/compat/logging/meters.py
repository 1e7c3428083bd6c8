"""Meters of fairseq's ``logging.meters``: running averages, sums and times that plug-ins report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def safe_round(number: Any, ndigits: int) -> Any:
    """``round``, also of one-element tensors; what has no digits stays as it is."""
    value = number.item() if hasattr(number, "item") else number
    return round(value, ndigits) if hasattr(value, "__round__") else value


class Meter:
    """Something that is updated and has a smoothed value."""

    round: int | None = None
    """Digits that are shown; None for all."""

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    @property
    def smoothed_value(self) -> Any:
        """The value to show."""
        raise NotImplementedError


class AverageMeter(Meter):
    """The weighted mean of the values it was given."""

    def __init__(self, round: int | None = None) -> None:
        self.round = round
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.val: Any = None
        self.sum: Any = 0
        self.count: Any = 0

    def update(self, val: Any, n: float = 1) -> None:
        """Add a value of weight ``n``; None only becomes the current value."""
        if val is not None:
            self.val = val
            if n > 0:
                self.sum, self.count = self.sum + val * n, self.count + n

    @property
    def avg(self) -> Any:
        """The mean; the current value before anything had a weight."""
        return self.sum / self.count if self.count > 0 else self.val

    @property
    def smoothed_value(self) -> Any:
        """The mean, rounded."""
        value = self.avg
        return safe_round(value, self.round) if self.round is not None and value is not None else value


class SumMeter(Meter):
    """The sum of the values it was given."""

    def __init__(self, round: int | None = None) -> None:
        self.round = round
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sum: Any = 0

    def update(self, val: Any) -> None:
        """Add a value."""
        self.sum = self.sum + (0 if val is None else val)

    @property
    def smoothed_value(self) -> Any:
        """The sum, rounded."""
        return self.sum if self.round is None else safe_round(self.sum, self.round)


class TimeMeter(Meter):
    """Events per second."""

    def __init__(self, init: float = 0, n: float = 0, round: int | None = None) -> None:
        self.round = round
        self.reset(init, n)

    def reset(self, init: float = 0, n: float = 0) -> None:
        """Begin to count now, with ``init`` seconds and ``n`` events behind."""
        self.init, self.n, self.i = init, n, 0
        self.start = time.perf_counter()

    def update(self, val: float = 1) -> None:
        """Note events."""
        self.n, self.i = self.n + val, self.i + 1

    @property
    def elapsed_time(self) -> float:
        """Seconds since the beginning."""
        return self.init + time.perf_counter() - self.start

    @property
    def avg(self) -> float:
        """Events per second."""
        return self.n / self.elapsed_time

    @property
    def smoothed_value(self) -> Any:
        """Events per second, rounded."""
        return self.avg if self.round is None else safe_round(self.avg, self.round)


class StopwatchMeter(Meter):
    """Seconds of something that is started and stopped."""

    sum: float
    n: float
    start_time: float | None

    def __init__(self, round: int | None = None) -> None:
        self.round = round
        self.reset()

    def start(self) -> None:
        """Begin to measure."""
        self.start_time = time.perf_counter()

    def stop(self, n: float = 1, prehook: Callable[[], None] | None = None) -> None:
        """Add the seconds since the start, for ``n`` events."""
        if self.start_time is not None:
            if prehook is not None:
                prehook()
            self.sum, self.n = self.sum + time.perf_counter() - self.start_time, self.n + n

    def reset(self) -> None:
        """Forget everything."""
        self.sum, self.n, self.start_time = 0.0, 0.0, None

    @property
    def avg(self) -> float:
        """Seconds per event; all seconds where none was counted."""
        return self.sum / self.n if self.n > 0 else self.sum

    @property
    def smoothed_value(self) -> Any:
        """Seconds per event, rounded."""
        return self.avg if self.round is None else safe_round(self.avg, self.round)


class MetersDict(dict[str, Meter]):
    """Meters by name, in order of priority, and figures derived from them."""

    def __init__(self) -> None:
        super().__init__()
        self._priorities: dict[str, int] = {}
        self._derived: dict[str, Callable[[MetersDict], Any]] = {}

    def add_meter(self, key: str, meter: Meter, priority: int) -> None:
        """Add a meter; small priorities come first."""
        self[key], self._priorities[key] = meter, priority

    def add_derived(self, key: str, fn: Callable[[MetersDict], Any], priority: int) -> None:
        """Add a figure that is computed from the meters."""
        self._derived[key], self._priorities[key] = fn, priority

    def get_smoothed_value(self, key: str) -> Any:
        """The value to show of a meter or of a derived figure."""
        return self._derived[key](self) if key in self._derived else self[key].smoothed_value

    def get_smoothed_values(self) -> dict[str, Any]:
        """All values to show; names that begin with ``_`` are hidden."""
        names = sorted(self._priorities, key=lambda key: self._priorities[key])
        return {name: self.get_smoothed_value(name) for name in names if not name.startswith("_")}

    def reset(self) -> None:
        """Forget what all meters have seen."""
        for meter in self.values():
            meter.reset()
