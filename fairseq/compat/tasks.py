"""Tasks in fairseq's form: ``setup_task(args)`` for scripts, and subclasses of the language modeling task."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fairseq.compat.flags import config_of
from fairseq.compat.samples import as_batch
from fairseq.config import build
from fairseq.data.batching import Blocks
from fairseq.registry import Entry, lookup
from fairseq.tasks import TASKS
from fairseq.tasks.configs import LanguageModelingConfig
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch


def setup_task(settings: Any, **more: object) -> Any:
    """The task of ``args.task``, with the options in ``args``; fairseq's ``--bpe`` and others are passed over.

    Raises: ValueError for an unknown task or a data folder that is none.
    """
    values = settings if isinstance(settings, dict) else vars(settings)
    entry = lookup(TASKS, values.get("task") or "language_modeling", "--task")
    return entry.load()(build(entry.config, values), **more)


class CollatedBlocks(Blocks):
    """A data set in fairseq's form (``__getitem__``, ``sizes``, ``collater``) as blocks of ours."""

    def __init__(self, dataset: Any, pad: int) -> None:
        self.dataset, self.pad = dataset, pad
        self._sizes = np.asarray(dataset.sizes)

    @property
    def sizes(self) -> npt.NDArray[Any]:
        """Tokens of each block."""
        return self._sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def collate(self, indices: npt.ArrayLike) -> LMBatch:
        """The batch of these blocks."""
        rows = [self.dataset[i] for i in np.asarray(indices).tolist()]
        return as_batch(self.dataset.collater(rows), self.pad)


class _LoadedSplits:
    """Blocks that come from the plug-in's ``load_dataset``."""

    def blocks(self: Any, split: str, block_size: int | None = None, epoch: int = 1, *, combine: bool = False) -> Any:
        """The blocks of a split; their size is the plug-in's affair."""
        self.load_dataset(split, epoch=epoch, combine=combine)
        found = self.dataset(split)
        return found if isinstance(found, Blocks) else CollatedBlocks(found, self.dictionary.pad())


def _make(kind: type[Any], config: LanguageModelingConfig, **more: object) -> Any:
    return kind.setup_task(config, **more)


def entry(kind: type[Any], dataclass: type | None) -> Entry:
    """A task in fairseq's form as an entry of our table.

    Raises: ValueError for a class that is no language modeling task.
    """
    if not (isinstance(kind, type) and issubclass(kind, LanguageModelingTask)):
        raise ValueError(
            f"register_task: {getattr(kind, '__name__', kind)} is no language modeling task; derive it from "
            "fairseq.tasks.language_modeling.LanguageModelingTask, or give a config as second argument"
        )
    loads = kind.load_dataset is not FairseqTask.load_dataset
    made = type(kind.__name__, (_LoadedSplits, kind), {}) if loads else kind
    return Entry(config_of(kind, dataclass, LanguageModelingConfig), functools.partial(_make, made))
