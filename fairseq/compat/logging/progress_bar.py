"""``fairseq.logging.progress_bar``: an iterable that shows how far it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from fairseq.metrics.training import format_figure
from fairseq.runtime.config import CommonConfig
from fairseq.training.progress import json_line

logger = logging.getLogger(__name__)


class ProgressBar:
    """Goes through an iterable; :meth:`log` notes figures, :meth:`print` reports them at the end of an epoch."""

    def __init__(self, iterable: Iterable[Any], config: CommonConfig, prefix: str = "") -> None:
        self.iterable, self.form, self.prefix = iterable, config.form, prefix
        self.interval, self.count = config.log_interval, 0
        self._bar = tqdm(iterable, prefix, leave=False) if self.form == "tqdm" else None

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        yield from self.iterable if self._bar is None else self._bar

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        """Show figures now and then."""
        self.count += 1
        if self._bar is not None:
            self._bar.set_postfix_str(_text(stats, "="))
        elif self.count % self.interval == 0:
            self.print(stats, tag, step)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        """Report figures in a line of the log."""
        if self.form == "json":
            logger.info("%s", json_line({}, {name: float(_number(value)) for name, value in stats.items()}))
        elif self.form != "none":
            logger.info("%s | %s", self.prefix, _text(stats, " "))


def progress_bar(
    iterator: Iterable[Any],
    log_format: str | None = None,
    log_interval: int = 100,
    epoch: int | None = None,
    prefix: str | None = None,
    **more: object,
) -> ProgressBar:
    """A progress bar in the form of ``--log-format``; other destinations are the trainer's affair."""
    where = [f"epoch {epoch:03d}"] if epoch is not None else []
    config = CommonConfig(log_format=log_format, log_interval=log_interval)
    return ProgressBar(iterator, config, " | ".join([*where, *([prefix] if prefix else [])]))


def build_progress_bar(
    settings: Any, iterator: Iterable[Any], epoch: int | None = None, prefix: str | None = None, **more: object
) -> ProgressBar:
    """As :func:`progress_bar`, by ``args.log_format`` and ``args.log_interval`` (fairseq 0.9)."""
    return progress_bar(
        iterator, getattr(settings, "log_format", None), getattr(settings, "log_interval", 100), epoch, prefix
    )


def _number(value: Any) -> Any:
    return getattr(value, "smoothed_value", value)


def _text(stats: Mapping[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{format_figure(name, _number(value))}" for name, value in stats.items())
