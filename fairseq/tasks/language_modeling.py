"""Next-token prediction on binarised text: from a data folder to batches, for training and for evaluation."""

from __future__ import annotations

import itertools
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.data.batching import batch_by_size, filter_by_size
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.models.architectures import build_model_config, model_class, model_name
from fairseq.tasks.configs import LanguageModelingConfig
from fairseq.tasks.fairseq_task import FairseqTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fairseq.models.transformer_lm import TransformerLanguageModel

logger = logging.getLogger(__name__)


class LanguageModelingTask(FairseqTask):
    """A data folder, its dictionary, and how its text is cut into blocks and batches."""

    def __init__(self, config: LanguageModelingConfig, dictionary: Dictionary | None = None) -> None:
        """Read the dictionary, unless it is given.

        Raises: ValueError or FileNotFoundError when the data folder is not one.
        """
        super().__init__(config)
        self.config = config
        self.folders = config.data.split(":")
        for folder in self.folders:
            if not os.path.isdir(folder):
                raise ValueError(f"data folder {folder!r} does not exist; preprocess.py makes one")
        path = os.path.join(self.folders[0], "dict.txt")
        if not os.path.exists(path):
            raise ValueError(f"{self.folders[0]!r} holds no dict.txt, so it is no data folder; preprocess.py makes one")
        self.dictionary = Dictionary.load(path) if dictionary is None else dictionary

    @property
    def max_positions(self) -> int:
        """Longest input a model of this task is made for, in tokens."""
        return self.config.max_target_positions or self.config.tokens_per_sample

    def prefix(self, split: str, epoch: int = 1) -> str:
        """Path of a split without ``.bin``; folders take turns by epoch for the training split.

        Raises: ValueError naming the splits that exist when this one does not.
        """
        folders = self.folders
        path = os.path.join(folders[(epoch - 1) % len(folders)], split)
        missing = [path + end for end in (".bin", ".idx") if not os.path.exists(path + end)]
        if len(missing) == 1:
            raise ValueError(f"split {split!r} is not whole: {missing[0]} is missing; run preprocess.py again")
        if missing:
            folder = os.path.dirname(path)
            here = sorted(name[:-4] for name in os.listdir(folder) if name.endswith(".idx"))
            raise ValueError(
                f"no split {split!r} at {path}.bin/.idx; the folder holds: {', '.join(here) or 'no binarised text'}"
            )
        return path

    def numbered_after(self, split: str) -> list[str]:
        """The splits ``split1``, ``split2``, ... of the first folder, as preprocess.py numbers several texts."""
        names = (f"{split}{number}" for number in itertools.count(1))
        return list(itertools.takewhile(lambda name: os.path.exists(f"{self.folders[0]}/{name}.idx"), names))

    def blocks(
        self, split: str, block_size: int | None = None, epoch: int = 1, *, combine: bool = False
    ) -> MonolingualDataset:
        """The blocks of a split, each with the token before it. ``block_size`` defaults to --tokens-per-sample.

        Args:
            combine: the splits numbered after it (``split1``, ...) continue its text.
        Raises: ValueError when there is no text, or it holds tokens the dictionary has not.
        """
        prefix = self.prefix(split, epoch)
        parts = [prefix, *(self.prefix(name) for name in (self.numbered_after(split) if combine else ()))]
        texts = [MMapIndexedDataset(part) for part in parts]
        for text, part in zip(texts, parts):
            self._require_known_tokens(text.tokens, part)
        # One text stays mapped.
        tokens, sizes = (
            (np.concatenate([text.tokens for text in texts]), np.concatenate([text.sizes for text in texts]))
            if len(texts) > 1
            else (texts[0].tokens, texts[0].sizes)
        )
        size = block_size or self.config.tokens_per_sample
        cut = TokenBlockDataset(tokens, sizes, size, self.config.sample_break_mode)
        if not len(cut):
            raise ValueError(
                f"split {split!r} is empty: {prefix}.bin holds {len(tokens)} tokens and no block; name another "
                "split, or run preprocess.py on a text with words"
            )
        dataset = MonolingualDataset(cut, pad=self.dictionary.pad(), eos=self.dictionary.eos(), **self._bos_setting())
        logger.info("%s: %d tokens in %d blocks of at most %d", ", ".join(parts), len(tokens), len(cut), size)
        return dataset

    def read_split(self, split: str, epoch: int, combine: bool) -> MonolingualDataset:
        """See the base class."""
        return LanguageModelingTask.blocks(self, split, epoch=epoch, combine=combine)

    def _bos_setting(self) -> dict[str, Any]:
        return {"bos": self.dictionary.bos()} if self.config.add_bos_token else {}

    def _require_known_tokens(self, tokens: np.ndarray[Any, Any], prefix: str) -> None:
        """A dictionary of other text shows here: every split but a tiny one uses its last types."""
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= len(self.dictionary):
            raise ValueError(
                f"{prefix}.bin holds token {largest}, but {self.folders[0]}/dict.txt has {len(self.dictionary)} types; "
                "the text was binarised with another dictionary: run preprocess.py again with --srcdict"
            )

    def training_batches(
        self,
        dataset: MonolingualDataset | LMContextWindowDataset,
        *,
        max_tokens: int | None,
        max_sentences: int | None,
        multiple: int,
        seed: int,
        shuffle: bool = True,
        skip_too_long: bool = True,
        max_positions: int | None = None,
        order: np.ndarray[Any, Any] | None = None,
    ) -> list[np.ndarray[Any, Any]]:
        """Batches of blocks, the same for every epoch.

        Blocks of like length share a batch; among equals the order is drawn from ``seed``.
        Raises: ValueError for a block longer than ``max_positions`` unless it may be skipped.
        """
        count = len(dataset.sizes)
        if order is None:
            order = np.random.default_rng(seed).permutation(count) if shuffle else np.arange(count)
            order = order[np.argsort(dataset.sizes[order], kind="stable")]
        kept, dropped = filter_by_size(order, dataset.sizes, max_positions or self.max_positions)
        if len(dropped) and not skip_too_long:
            raise ValueError(
                f"block {dropped[0]} has {dataset.sizes[dropped[0]]} tokens, the model reads at most "
                f"{max_positions or self.max_positions}; "
                "leave such blocks out with --skip-invalid-size-inputs-valid-test"
            )
        if len(dropped):
            logger.warning("%d of %d blocks are longer than the model's positions and are dropped", len(dropped), count)
        if not len(kept):
            raise ValueError(
                f"all {count} blocks are longer than the model's {max_positions or self.max_positions} positions; "
                "lower --tokens-per-sample, or raise --max-target-positions"
            )
        return batch_by_size(kept, dataset.sizes, max_tokens, max_sentences, multiple)

    def iterator(
        self,
        dataset: MonolingualDataset | LMContextWindowDataset,
        batches: list[np.ndarray[Any, Any]],
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

    def build_model(self, arch: str, given: Mapping[str, Any]) -> TransformerLanguageModel:
        """A fresh model of a named size, for this dictionary; ``given`` are the flags that override the size."""
        limits = {"max_target_positions": self.max_positions}
        config = build_model_config(arch, limits | dict(given))
        kind = model_class(model_name(arch))
        model: TransformerLanguageModel = kind.build(config, len(self.dictionary), self.dictionary.pad())
        return model
