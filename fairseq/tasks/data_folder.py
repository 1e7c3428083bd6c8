"""What tasks on a folder of binarised text have in common: its splits, batches and how they are gone through."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fairseq.checkpoint_utils import load_model_for
from fairseq.data.batching import batch_by_size
from fairseq.data.iterators import EpochBatchIterator
from fairseq.models.architectures import build_model_config, model_class, model_name
from fairseq.runtime.distributed import runs_on_gpu
from fairseq.tasks.fairseq_task import FairseqTask

if TYPE_CHECKING:
    from fairseq.checkpoint_utils import Checkpoint
    from fairseq.data.batching_config import DatasetConfig
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.runtime.config import RuntimeConfig

logger = logging.getLogger(__name__)
IntArray = np.ndarray[Any, Any]


class Collating(Protocol):
    """A data set that makes batches of its examples."""

    def collate(self, indices: Any) -> Any:
        """The batch of these."""
        ...


class Examples(Collating, Protocol):
    """Blocks or sentence pairs that batches are made of."""

    unit: str

    @property
    def sizes(self) -> IntArray:
        """Tokens of each."""
        ...

    def order(self, seed: int, *, shuffle: bool) -> IntArray:
        """Numbers in an order in which neighbours have like lengths."""
        ...

    def fits(self, max_positions: int) -> IntArray:
        """True for those that a model of so many positions reads."""
        ...

    def lengths(self, i: int) -> str:
        """Length of one, in words."""
        ...

    def limits(self, max_positions: int) -> str:
        """Longest that a model reads, in words."""
        ...


class DataFolderTask(FairseqTask):
    """A task whose data is one folder of preprocess.py, or several that take turns by epoch."""

    def __init__(self, config: Any) -> None:
        """Raises: ValueError for a folder that does not exist."""
        super().__init__(config)
        self.config = config
        self.folders = config.data.split(":")
        for folder in self.folders:
            if not os.path.isdir(folder):
                raise ValueError(f"data folder {folder!r} does not exist; preprocess.py makes one")

    @property
    def max_positions(self) -> int:
        """Longest text a model of this task is made for, in tokens."""
        raise NotImplementedError

    @property
    def dictionary_path(self) -> str:
        """File of the dictionary of what models predict."""
        raise NotImplementedError

    def prefixes(self, split: str, epoch: int = 1) -> list[str]:
        """Paths of a split's texts without ``.bin``, one per language. Raises: ValueError when there is none."""
        raise NotImplementedError

    def has_split(self, split: str) -> bool:
        """True if the first folder holds a split."""
        raise NotImplementedError

    def numbered_after(self, split: str) -> list[str]:
        """The splits ``split1``, ``split2``, ... of the first folder, as preprocess.py numbers several texts."""
        names = (f"{split}{number}" for number in itertools.count(1))
        return list(itertools.takewhile(self.has_split, names))

    def training_batches(
        self,
        dataset: Examples,
        *,
        max_tokens: int | None,
        max_sentences: int | None,
        multiple: int,
        seed: int,
        shuffle: bool = True,
        skip_too_long: bool = True,
        max_positions: int | None = None,
        order: IntArray | None = None,
    ) -> list[IntArray]:
        """Batches of examples, the same for every epoch.

        Examples of like length share a batch; among equals the order is drawn from ``seed``.
        Raises: ValueError for one longer than ``max_positions`` unless it may be skipped.
        """
        count, unit, limit = len(dataset.sizes), dataset.unit, max_positions or self.max_positions
        if order is None:
            order = dataset.order(seed, shuffle=shuffle)
        fits = dataset.fits(limit)[order]
        kept, dropped = order[fits], order[~fits]
        if len(dropped) and not skip_too_long:
            raise ValueError(
                f"{unit} {dropped[0]} has {dataset.lengths(int(dropped[0]))}, the model reads at most "
                f"{dataset.limits(limit)}; leave such {unit}s out with --skip-invalid-size-inputs-valid-test"
            )
        if len(dropped):
            logger.warning(
                "%d of %d %ss are longer than the model's positions and are dropped", len(dropped), count, unit
            )
        if not len(kept):
            raise ValueError(
                f"all {count} {unit}s are longer than the model's {dataset.limits(limit)} positions; {self.way_out}"
            )
        return batch_by_size(kept, dataset.sizes, max_tokens, max_sentences, multiple, unit)

    def batches(
        self, dataset: Examples, config: DatasetConfig, *, seed: int, max_positions: int, shuffle: bool = False
    ) -> list[IntArray]:
        """Batches for a pass over a split that trains nothing, sized and filtered as the options say.

        Args:
            shuffle: draw the order of equally long examples from ``seed``.
        Raises: ValueError as :meth:`training_batches`.
        """
        return self.training_batches(
            dataset,
            max_tokens=config.max_tokens,
            max_sentences=config.max_sentences,
            multiple=config.required_batch_size_multiple,
            seed=seed,
            shuffle=shuffle,
            skip_too_long=config.skip_invalid_size_inputs_valid_test,
            max_positions=max_positions,
        )

    def for_models(self, dataset: Any, models: Sequence[TransformerLanguageModel]) -> Any:
        """The same examples, of which those fit that all models read (see ``batches``)."""
        del models
        return dataset

    def attach(self, models: Sequence[Any], *, trains: bool) -> None:
        """The models that are trained or evaluated, before the first split is read.

        Raises: ValueError for a model that the task does not fit.
        """
        del trains
        if any(getattr(model, "extends", None) is not None and not model.config.short_cut for model in models):
            raise ValueError(
                "the model is a GNN-LM, which reads neighbours: train it with --arch transformer_lm_gnn, and evaluate "
                "it by itself or with others of its kind"
            )

    def check_start(self, path: str | None, config: Mapping[str, Any], *, resumes: bool) -> None:
        """What training starts from: a checkpoint with its config, or None for fresh weights.

        Args:
            resumes: it is this run's own checkpoint.
        Raises: ValueError where the task needs another start.
        """
        del path, config, resumes

    def check_checkpoint(self, path: str, trained: Mapping[str, Any]) -> None:
        """A checkpoint that is evaluated, with the settings of its task. Raises: ValueError where it does not fit."""
        del path, trained

    def facts_of_model(self) -> dict[str, Any]:
        """What a checkpoint records of the task besides its settings, as plain values."""
        return {}

    def facts(self, split: str) -> dict[str, Any]:
        """What decides the scores of a split besides its text and the model, as plain values."""
        del split
        return {}

    way_out = "raise --max-target-positions"

    def iterator(
        self,
        dataset: Collating,
        batches: list[IntArray],
        *,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = False,
        group: int = 1,
        ordered_epochs: int = 0,
    ) -> EpochBatchIterator:
        """Go through batches epoch by epoch."""
        return EpochBatchIterator(
            dataset.collate,
            batches,
            seed=seed,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            shuffle=shuffle,
            group=group,
            ordered_epochs=ordered_epochs,
        )

    def build_model(self, arch: str, given: Mapping[str, Any]) -> Any:
        """A fresh model of a named size, for this task's dictionaries; ``given`` are flags that override the size."""
        config = build_model_config(arch, self.model_limits() | dict(given))
        kind = model_class(model_name(arch))
        sizes = {} if self.source is None else {"source_size": len(self.source)}
        return kind.build(config, len(self.dictionary), self.dictionary.pad(), **sizes)

    def load_model(
        self, checkpoint: Checkpoint, path: str, overrides: Mapping[str, Any] | None, runtime: RuntimeConfig
    ) -> TransformerLanguageModel:
        """The model of a checkpoint for use, not for training: on its device and in its precision.

        Raises: ValueError naming ``path`` when it does not fit this task's dictionaries.
        """
        device = "cuda" if runs_on_gpu(runtime) else "cpu"
        model = load_model_for(self.dictionary, checkpoint, path, overrides, self.source)
        if runtime.any_fp16 and device == "cpu":
            logger.warning("--fp16 needs a GPU; the model runs in float32 (--bf16 runs on CPUs)")
        elif runtime.any_fp16:
            model = model.half()
        if runtime.any_bf16:
            model = model.bfloat16()
        return model.to(device).eval().requires_grad_(False)

    def model_limits(self) -> dict[str, int]:
        """Positions of a fresh model, by the names of its settings."""
        return {"max_target_positions": self.max_positions}

    def require_known_tokens(self, largest: int, text: str, dictionary: str, size: int) -> None:
        """Raise ValueError for a token the dictionary has not.

        A dictionary of other text shows here: every split but a tiny one uses its last types.
        """
        if largest >= size:
            raise ValueError(
                f"{text}.bin holds token {largest}, but {dictionary} has {size} types; the text was binarised with "
                "another dictionary: run preprocess.py again with --srcdict"
            )
