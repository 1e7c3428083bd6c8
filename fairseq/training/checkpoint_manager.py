"""The checkpoint files of a training run: which are written, and which older ones are removed."""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fairseq.checkpoints.parts import remove_unnamed
from fairseq.runtime.files import locked
from fairseq.training.config import CheckpointConfig

logger = logging.getLogger(__name__)


@contextmanager
def holding_save_dir(config: CheckpointConfig) -> Iterator[None]:
    """Keep other training runs out of ``--save-dir`` while the block runs; the processes of one run share it.

    Raises: ValueError when the folder cannot be written; OSError when another run holds it.
    """
    folder, ranks = Path(config.save_dir), ("RANK", "LOCAL_RANK", "NODE_RANK")
    if config.no_save or any(os.environ.get(name, "0") != "0" for name in ranks):
        yield
        return
    existed = folder.is_dir()
    _make_folder(config.save_dir)
    try:
        with locked(folder / ".train.lock", f"the checkpoints of --save-dir {config.save_dir!r}"):
            yield
    finally:
        if not existed:
            with suppress(OSError):  # it is not empty after a run
                folder.rmdir()


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save-dir {folder!r} cannot be made: {error.strerror}; choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--save-dir {folder!r} cannot be written; choose another folder")


class CheckpointManager:
    """Names, links and prunes the checkpoints in ``--save-dir``; remembers the best validation figure.

    Each state is written once, whole, under its first name; its other names are links to the same file (or copies
    where the file system has no links). ``checkpoint_last.pt`` gets its name last, so that a run that is killed
    in between resumes from the state before and writes the same names again.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.best: float | None = None
        self.validations_without_better = 0

    def prepare(self) -> None:
        """Make the folder. Raises: ValueError when it cannot be written, before any training."""
        if self.config.no_save:
            return
        _make_folder(self.config.save_dir)
        for aside in glob.glob(os.path.join(glob.escape(self.config.save_dir), "*.pt*.tmp")):
            os.remove(aside)

    def path(self, name: str) -> str:
        """Path of a checkpoint of this run."""
        return os.path.join(self.config.save_dir, name)

    def restore_path(self) -> str | None:
        """The checkpoint to resume from, or None for a new run.

        Raises: ValueError when --restore-file names one that does not exist.
        """
        named = self.config.restore_file
        path = named if os.path.dirname(named) else self.path(named)
        if os.path.exists(path):
            return path
        if named != "checkpoint_last.pt":
            raise ValueError(f"--restore-file {named}: {path} does not exist; leave the flag out to start afresh")
        return None

    def is_better(self, figure: float) -> bool:
        """True if a validation figure beats every one before."""
        if self.best is None:
            return True
        return figure > self.best if self.config.maximize_best_checkpoint_metric else figure < self.best

    def note(self, figure: float | None) -> bool:
        """Remember a validation figure (None: there was no validation). Returns whether it is the best so far."""
        if figure is None:
            return False
        better = self.is_better(figure)
        self.best = figure if better else self.best
        self.validations_without_better = 0 if better else self.validations_without_better + 1
        return better

    @property
    def out_of_patience(self) -> bool:
        """True if --patience validations have passed without a better figure."""
        return 0 < self.config.patience <= self.validations_without_better

    def state_dict(self) -> dict[str, float | int | None]:
        """State that a resumed run needs."""
        return {"best": self.best, "validations_without_better": self.validations_without_better}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Take up where :meth:`state_dict` left off."""
        self.best = state["best"]
        self.validations_without_better = int(state["validations_without_better"] or 0)

    def names(self, *, epoch: int, update: int, end_of_epoch: bool, better: bool, figure: float | None) -> list[str]:
        """The names the state of this moment goes under, checkpoint_last.pt at the end; none with --no-save."""
        config = self.config
        names: list[str] = []
        if config.no_save:
            return names
        if end_of_epoch and not config.no_epoch_checkpoints and epoch % config.save_interval == 0:
            names.append(f"checkpoint{epoch}.pt")
        if config.saves_after(update):  # also at an epoch's end, where fairseq writes no such file
            names.append(f"checkpoint_{epoch}_{update}.pt")
        if better:
            names.append("checkpoint_best.pt")
        if figure is not None and config.keep_best_checkpoints > 0:
            names.append(f"checkpoint.best_{config.best_checkpoint_metric}_{figure:.4f}.pt")
        if not config.no_last_checkpoints:
            names.append("checkpoint_last.pt")
        return names

    def write(self, names: list[str], save: Callable[[str], None]) -> None:
        """Write a state under its names, of which there is one at least, and remove what is no longer kept.

        Args:
            save: writes the state to a path, whole or not at all.
        """
        first = self.path(names[0])
        save(first)
        for name in names[1:]:
            _link(first, self.path(name))
        self._prune()
        remove_unnamed(self.config.save_dir)
        logger.info("saved %s", ", ".join(self.path(name) for name in names))

    def _prune(self) -> None:
        config = self.config
        by_update = self._found(r"checkpoint_\d+_(\d+)\.pt")
        by_epoch = self._found(r"checkpoint(\d+)\.pt")
        metric = re.escape(config.best_checkpoint_metric)
        by_figure = self._found(rf"checkpoint\.best_{metric}_(-?\d+\.?\d*)\.pt")
        if not config.maximize_best_checkpoint_metric:
            by_figure.reverse()
        for found, kept in (
            (by_update, config.keep_interval_updates),
            (by_epoch, config.keep_last_epochs),
            (by_figure, config.keep_best_checkpoints),
        ):
            for path in found[: max(0, len(found) - kept)] if kept > 0 else []:
                os.remove(path)

    def _found(self, pattern: str) -> list[str]:
        """Paths whose name matches, in ascending order of the number in the name."""
        hits = [(re.fullmatch(pattern, name), name) for name in os.listdir(self.config.save_dir)]
        numbered = [(float(hit.group(1)), name) for hit, name in hits if hit]
        return [self.path(name) for _, name in sorted(numbered)]


def _link(source: str, target: str) -> None:
    """Give a finished file a second name, replacing what had it, in one step."""
    aside = target + ".tmp"
    if os.path.exists(aside):
        os.remove(aside)
    try:
        os.link(source, aside)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, aside)
    os.replace(aside, target)
    if os.path.exists(aside):  # os.replace leaves the source when both names were the same file already
        os.remove(aside)
