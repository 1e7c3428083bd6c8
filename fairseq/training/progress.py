"""Progress of a run: a bar or lines while it runs, a line at each end, and copies to trackers if asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from fairseq.metrics.training import Figures, format_figure
from fairseq.runtime.config import CommonConfig

logger = logging.getLogger(__name__)

_LINE = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


def copy_log_to_file(config: CommonConfig) -> logging.Handler | None:
    """Let ``--log-file`` receive all log lines from now on. Raises: OSError when it cannot be written."""
    if config.log_file is None:
        return None
    handler = logging.FileHandler(config.log_file)
    handler.setFormatter(logging.Formatter(_LINE, "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    return handler


class Tracker(Protocol):
    """Destination of figures besides the log."""

    def write(self, tag: str, figures: Figures, step: int) -> None:
        """Keep the figures of one moment; ``tag`` is train_inner, train, or a validation split."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoardTracker:
    """One folder of event files per tag."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("--tensorboard-logdir", "tensorboard") from error
        os.makedirs(folder, exist_ok=True)
        self._folder, self._open, self._writers = folder, SummaryWriter, dict[str, Any]()

    def write(self, tag: str, figures: Figures, step: int) -> None:
        """See :class:`Tracker`."""
        if tag not in self._writers:
            self._writers[tag] = self._open(os.path.join(self._folder, tag))
        for name, value in figures.items():
            self._writers[tag].add_scalar(name, value, step)
        self._writers[tag].flush()

    def close(self) -> None:
        """See :class:`Tracker`."""
        for writer in self._writers.values():
            writer.close()


class WandbTracker:
    """A run of a project; wandb's own environment variables (WANDB_NAME, WANDB_MODE ...) count."""

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("--wandb-project", "wandb") from error
        self._run = wandb.init(project=project)

    def write(self, tag: str, figures: Figures, step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log({f"{tag}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


def _missing(option: str, package: str) -> ValueError:
    return ValueError(
        f"{option} needs the package {package}, which is not installed: pip install 'fairseq-memory[track]'"
    )


class Progress:
    """Shows the progress of a run. Trackers are opened at once, so that a missing package stops a run before it starts.

    Args:
        enabled: False on all processes but the first: nothing is shown or tracked.
    """

    def __init__(self, config: CommonConfig, *, enabled: bool = True) -> None:
        self.config = config
        self.form = config.form if enabled else "none"
        self._trackers: list[Tracker] = []
        if enabled and config.tensorboard_logdir:
            self._trackers.append(TensorBoardTracker(config.tensorboard_logdir))
        if enabled and config.wandb_project:
            self._trackers.append(WandbTracker(config.wandb_project))
        self._tracks = bool(self._trackers)

    @contextlib.contextmanager
    def epoch(self, epoch: int, total: int, done: int = 0) -> Iterator[EpochProgress]:
        """Show an epoch of ``total`` updates of which ``done`` were made in an earlier run."""
        if self.form != "tqdm":
            yield EpochProgress(self, epoch, total, done)
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        bar = tqdm(total=total, initial=done, desc=f"epoch {epoch:03d}", leave=False, dynamic_ncols=True)
        with bar, logging_redirect_tqdm():
            yield EpochProgress(self, epoch, total, done, bar)

    def end_of_epoch(self, epoch: int, figures: Figures) -> None:
        """Report the figures of a whole epoch."""
        if self.form not in ("none", "json"):
            logger.info("end of epoch %d (average epoch stats below)", epoch)
        self._end("train", epoch, "", figures)

    def validated(self, subset: str, epoch: int, figures: Figures) -> None:
        """Report the figures of a validation split."""
        self._end(subset, epoch, f" | valid on {subset!r} subset", figures)

    def close(self) -> None:
        """Let the trackers write out what is left."""
        for tracker in self._trackers:
            tracker.close()

    def _end(self, tag: str, epoch: int, what: str, figures: Figures) -> None:
        if self.form == "json":
            self._line(tag, json_line({"epoch": epoch}, figures, f"{tag}_"))
        else:
            self._line(tag, " | ".join([f"epoch {epoch:03d}{what}", *_written(figures, " ")]))
        self.track(tag, figures)

    def _line(self, tag: str, line: str) -> None:
        if self.form != "none":
            logging.getLogger(tag).info("%s", line)

    def track(self, tag: str, figures: Figures) -> None:
        """Hand figures to the trackers, at the step in their ``num_updates``."""
        numbers = {name: value for name, value in figures.items() if name != "num_updates" and math.isfinite(value)}
        for tracker in self._trackers:
            tracker.write(tag, numbers, int(figures.get("num_updates", 0)))

    @property
    def wants_figures(self) -> bool:
        """True if figures within an epoch are shown or tracked."""
        return self.form != "none" or self._tracks


class EpochProgress:
    """The progress within one epoch."""

    def __init__(self, progress: Progress, epoch: int, total: int, done: int, bar: Any = None) -> None:
        self._progress, self._epoch, self._total, self._done, self._bar = progress, epoch, total, done, bar

    def step(self, figures: Callable[[], Figures]) -> None:
        """Note that an update is done; every ``--log-interval`` updates ``figures`` is called and shown."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        progress = self._progress
        if self._done % progress.config.log_interval or not progress.wants_figures:
            return
        shown = figures()
        tag = "train_inner"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_written(shown, "=")))
        elif progress.form == "json":
            update = round(self._epoch - 1 + self._done / self._total, 3)
            progress._line(tag, json_line({"epoch": self._epoch, "update": update}, shown))
        else:
            place = f"epoch {self._epoch:03d}:  {self._done:5d} / {self._total}"
            progress._line(tag, f"{place} {', '.join(_written(shown, '='))}")
        progress.track(tag, shown)


def _written(figures: Figures, between: str) -> list[str]:
    return [f"{name}{between}{format_figure(name, value)}" for name, value in figures.items()]


def json_line(where: Mapping[str, float], figures: Figures, prefix: str = "") -> str:
    """One JSON object; JSON has no infinity, so ``inf`` and ``nan`` become strings that ``float()`` reads."""
    line: dict[str, Any] = dict(where)
    for name, value in figures.items():
        text = format_figure(name, value)
        line[prefix + name] = type(value)(text) if math.isfinite(value) else text
    return json.dumps(line)
