"""Figures of the server in Prometheus' text format.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of a histogram's buckets."""
Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A sum that only grows, for each set of labels."""

    name: str
    help: str
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Add to the sum of these labels."""
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0.0) + amount

    def lines(self) -> list[str]:
        """Its lines."""
        values = self.values or {(): 0.0}
        return [*_head(self.name, "counter", self.help), *(_line(self.name, k, v) for k, v in sorted(values.items()))]


@dataclass
class Gauge:
    """A value that is read when it is asked for."""

    name: str
    help: str
    read: Callable[[], dict[Labels, float]]

    def lines(self) -> list[str]:
        """Its lines."""
        values = sorted(self.read().items())
        return [*_head(self.name, "gauge", self.help), *(_line(self.name, key, value) for key, value in values)]


@dataclass
class Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    name: str
    help: str
    bounds: Sequence[float] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        place = next((n for n, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.total += value

    @property
    def mean(self) -> float:
        """Mean of the values; 0 before the first."""
        return self.total / max(1, sum(self.counts))

    def lines(self) -> list[str]:
        """Its lines."""
        found, count = _head(self.name, "histogram", self.help), 0
        for bound, more in zip([*map(_number, self.bounds), "+Inf"], self.counts):
            count += more
            found.append(_line(f"{self.name}_bucket", (("le", bound),), count))
        return [*found, _line(f"{self.name}_sum", (), self.total), _line(f"{self.name}_count", (), count)]


class Metrics:
    """All figures of a server. Counting is done by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gauges: list[Gauge] = []
        self.requests = Counter("fairseq_requests_total", "Answered requests by path and HTTP status.")
        self.prompt_tokens = Counter("fairseq_prompt_tokens_total", "Tokens of prompts that were read.")
        self.tokens = Counter("fairseq_generated_tokens_total", "Tokens that were generated.")
        self.lookups = Counter("fairseq_lookups_total", "Positions whose neighbours were looked up.")
        self.searches = Counter("fairseq_searches_total", "Of these, positions that needed a search.")
        self.cancelled = Counter("fairseq_cancelled_total", "Generations whose client went away.")
        self.rejected = Counter("fairseq_rejected_total", "Requests that were rejected because the queue was full.")
        self.added = Counter("fairseq_documents_added_total", "Documents added, by store.")
        self.deleted = Counter("fairseq_documents_deleted_total", "Documents deleted, by store.")
        self.seconds = Histogram("fairseq_generation_seconds", "Seconds from a generation's arrival to its end.")
        self.first_token = Histogram("fairseq_first_token_seconds", "Seconds from arrival to the first token.")

    def add_gauge(self, name: str, text: str, read: Callable[[], dict[Labels, float]]) -> None:
        """Show a value that is read at each request."""
        self._gauges.append(Gauge(name, text, read))

    def count(self, what: Counter | Histogram, value: float = 1.0, **labels: str) -> None:
        """Add to a counter, or a value to a histogram."""
        with self._lock:
            what.add(value, **labels)

    def text(self) -> str:
        """All figures, as Prometheus reads them."""
        with self._lock:
            parts = [each.lines() for each in vars(self).values() if isinstance(each, (Counter, Histogram))]
        parts += [gauge.lines() for gauge in self._gauges]
        return "\n".join(line for part in parts for line in part) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return [f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{shown}}} {_number(value)}" if shown else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
