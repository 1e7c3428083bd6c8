"""Next-token prediction on binarised text: from a data folder to batches, for training and for evaluation."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.tasks.configs import LanguageModelingConfig
from fairseq.tasks.data_folder import DataFolderTask

logger = logging.getLogger(__name__)


class LanguageModelingTask(DataFolderTask):
    """A data folder, its dictionary, and how its text is cut into blocks and batches."""

    way_out = "lower --tokens-per-sample, or raise --max-target-positions"

    def __init__(self, config: LanguageModelingConfig, dictionary: Dictionary | None = None) -> None:
        """Read the dictionary, unless it is given.

        Raises: ValueError or FileNotFoundError when the data folder is not one.
        """
        super().__init__(config)
        path = self.dictionary_path
        if not os.path.exists(path):
            raise ValueError(f"{self.folders[0]!r} holds no dict.txt, so it is no data folder; preprocess.py makes one")
        self.dictionary = Dictionary.load(path) if dictionary is None else dictionary

    @property
    def dictionary_path(self) -> str:
        """See the base class."""
        return os.path.join(self.folders[0], "dict.txt")

    @property
    def max_positions(self) -> int:
        """Longest input a model of this task is made for, in tokens."""
        return int(self.config.max_target_positions or self.config.tokens_per_sample)

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

    def prefixes(self, split: str, epoch: int = 1) -> list[str]:
        """See the base class."""
        return [self.prefix(split, epoch)]

    def has_split(self, split: str) -> bool:
        """See the base class."""
        return os.path.exists(f"{self.folders[0]}/{split}.idx")

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
            largest = int(text.tokens.max()) if len(text.tokens) else -1
            self.require_known_tokens(largest, part, self.dictionary_path, len(self.dictionary))
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
