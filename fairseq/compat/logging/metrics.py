"""``fairseq.logging.metrics``: figures that are logged by name, into every aggregation that is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fairseq.compat.logging.meters import AverageMeter, Meter, MetersDict, StopwatchMeter

_open: list[MetersDict] = []
_named: dict[str, MetersDict] = {}


@contextlib.contextmanager
def aggregate(name: str | None = None, new_root: bool = False) -> Iterator[MetersDict]:
    """Collect what is logged within the block.

    Args:
        name: collect into the aggregation of this name, which lives on; by default into a fresh one.
        new_root: what is logged within is hidden from the aggregations around.
    """
    found = MetersDict() if name is None else _named.setdefault(name, MetersDict())
    before = list(_open)
    _open[:] = [found] if new_root else [*before, found]
    try:
        yield found
    finally:
        _open[:] = before


def get_active_aggregators() -> list[MetersDict]:
    """The aggregations that are open."""
    return list(_open)


def log_scalar(key: str, value: Any, weight: float = 1, priority: int = 10, round: int | None = None) -> None:
    """Log a value; its figure is the mean weighted by ``weight``."""
    for meters in _open:
        if key not in meters:
            meters.add_meter(key, AverageMeter(round), priority)
        meter = meters[key]
        assert isinstance(meter, AverageMeter), key
        meter.update(value, weight)


def log_derived(key: str, fn: Callable[[MetersDict], Any], priority: int = 20) -> None:
    """Log a figure computed from the other ones when it is shown."""
    for meters in _open:
        meters.add_derived(key, fn, priority)


def log_start_time(key: str, priority: int = 40, round: int | None = None) -> None:
    """Start to measure the seconds of something."""
    for meters in _open:
        if key not in meters:
            meters.add_meter(key, StopwatchMeter(round), priority)
        _watch(meters, key).start()


def log_stop_time(key: str, weight: float = 0.0, prehook: Callable[[], None] | None = None) -> None:
    """Stop measuring the seconds of something."""
    for meters in _open:
        if key in meters:
            _watch(meters, key).stop(weight, prehook)


def _watch(meters: MetersDict, key: str) -> StopwatchMeter:
    meter = meters[key]
    assert isinstance(meter, StopwatchMeter), key
    return meter


def get_meter(name: str, key: str) -> Meter | None:
    """A meter of a named aggregation, None when there is none."""
    return _named.get(name, MetersDict()).get(key)


def get_smoothed_value(name: str, key: str) -> Any:
    """The value to show of a meter in a named aggregation."""
    return _named[name].get_smoothed_value(key)


def get_smoothed_values(name: str) -> dict[str, Any]:
    """All values to show of a named aggregation."""
    return _named[name].get_smoothed_values()


def reset_meters(name: str) -> None:
    """Forget what a named aggregation has seen."""
    if name in _named:
        _named[name].reset()


def reset() -> None:
    """Forget all aggregations."""
    _named.clear()
