"""Data sets with the constructors and items of fairseq, over ours.

Items are tensors; ``collater`` makes fairseq's samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.compat.samples import Sample, as_sample
from fairseq.data import lm_context_window_dataset, monolingual_dataset, token_block_dataset


class FairseqDataset(torch.utils.data.Dataset[Any]):
    """A data set with ``sizes`` and ``collater``; tasks in fairseq's form may serve it."""

    def num_tokens(self, index: int) -> int:
        """Tokens of an item."""
        return int(self.sizes[index])  # type: ignore[attr-defined]

    def size(self, index: int) -> int:
        """Size of an item, by which it is dropped as too long."""
        return self.num_tokens(index)

    def ordered_indices(self) -> Any:
        """The items in the order of batches."""
        return np.arange(len(self))  # type: ignore[arg-type]

    def collater(self, samples: list[Any]) -> Any:
        """The batch of these items."""
        raise NotImplementedError

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing: text is mapped."""

    @property
    def supports_prefetch(self) -> bool:
        """False: text is mapped."""
        return False

    def set_epoch(self, epoch: int) -> None:
        """An epoch begins."""


class BaseWrapperDataset(FairseqDataset):
    """A data set around another one, whose members it has."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sizes(self) -> Any:
        """Sizes of the items."""
        return self.dataset.sizes

    def collater(self, samples: list[Any]) -> Any:
        """The batch of these items."""
        return self.dataset.collater(samples)


class TokenBlockAdapter(token_block_dataset.TokenBlockDataset):
    """Blocks of sentences (an indexed data set, or rows of numbers), as tensors."""

    def __init__(
        self,
        dataset: Any,
        sizes: Any,
        block_size: int | None,
        pad: int | None = None,
        eos: int | None = None,
        break_mode: str | None = None,
        include_targets: bool = False,
        document_sep_len: int = 1,
    ) -> None:
        """Cut the text. Raises: ValueError for another ``document_sep_len`` than 1, or an impossible size."""
        if document_sep_len != 1:
            raise ValueError(f"document_sep_len {document_sep_len}: separators are sentences of one token; give 1")
        tokens = getattr(dataset, "tokens", None)
        if tokens is None:
            tokens = np.concatenate([np.empty(0, np.int64), *(np.asarray(row) for row in dataset)])
        super().__init__(tokens, np.asarray(sizes), block_size, break_mode or "none")
        self.include_targets = include_targets
        self._shifted = monolingual_dataset.MonolingualDataset(self, pad or 0, 0 if eos is None else eos)

    def __getitem__(self, i: int) -> Any:
        """Block ``i``; with ``include_targets`` (source, target, past), each as long."""
        block = super().__getitem__(i)
        if not self.include_targets:
            return torch.from_numpy(block)
        source, start = self._shifted.source(i), int(self.starts[i])
        before = self.tokens[start - 2] if start > 1 else self._shifted.pad or 0
        past = np.concatenate([[before], source[:-1]])
        return torch.from_numpy(source), torch.from_numpy(block), torch.from_numpy(past)


class MonolingualAdapter(FairseqDataset):
    """Blocks where each token is predicted from those before it: items with ``id``, ``source`` and ``target``."""

    def __init__(
        self,
        dataset: TokenBlockAdapter,
        sizes: Any,
        src_vocab: Any,
        tgt_vocab: Any = None,
        add_eos_for_other_targets: bool = False,
        shuffle: bool = False,
        targets: Any = None,
        add_bos_token: bool = False,
    ) -> None:
        """Serve blocks. Raises: ValueError for other targets than the next token."""
        super().__init__()
        if targets not in (None, ["future"]):
            raise ValueError(f"targets {targets}: a language model predicts the next token here; give ['future']")
        bos = {"bos": src_vocab.bos()} if add_bos_token else {}
        self.vocab, self.shuffle = src_vocab, shuffle
        self.blocks = monolingual_dataset.MonolingualDataset(dataset, src_vocab.pad(), src_vocab.eos(), **bos)

    @property
    def sizes(self) -> Any:
        """Scored tokens of each block."""
        return self.blocks.sizes

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"id": i, "source": _row(self.blocks.source(i)), "target": _row(np.asarray(self.target(i)))}

    def target(self, i: int) -> Any:
        """The tokens of block ``i``."""
        return token_block_dataset.TokenBlockDataset.__getitem__(self.blocks.blocks, i)

    def collate(self, indices: Iterable[int]) -> Any:
        """The batch of these blocks, as ours."""
        ids = np.asarray(indices, dtype=np.int64)
        context = np.array([] if self.blocks.bos is None else [self.blocks.bos], dtype=np.int64)
        rows = ((context, self.blocks.source(i), self.target(i)) for i in ids.tolist())
        return monolingual_dataset.pad_rows(ids, rows, self.blocks.pad)

    def collater(self, samples: list[dict[str, Any]]) -> Sample:
        """The sample of these items."""
        return as_sample(self.collate([sample["id"] for sample in samples]), self.vocab.pad())

    def ordered_indices(self) -> Any:
        """By size; among equals in random order if asked to shuffle."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        return order[np.argsort(self.sizes[order], kind="stable")]


class LMContextWindowAdapter(BaseWrapperDataset):
    """Blocks preceded by up to ``context_window`` tokens of the text before, which are not scored."""

    def __init__(self, dataset: Any, tokens_per_sample: int, context_window: int, pad_idx: int) -> None:
        super().__init__(dataset)
        self.pad_idx = pad_idx
        blocks = getattr(dataset, "blocks", dataset)
        plain = token_block_dataset.TokenBlockDataset.split(blocks.blocks, max(1, int(blocks.sizes.max(initial=1))))
        own = monolingual_dataset.MonolingualDataset(plain, blocks.pad, blocks.eos, blocks.bos)
        longest = tokens_per_sample + context_window
        kept = np.arange(len(own))
        self.windows = lm_context_window_dataset.LMContextWindowDataset(own, kept, context_window, longest)

    def collater(self, samples: list[dict[str, Any]]) -> Sample:
        """The sample of these items; ``start_indices`` are the lengths of the contexts."""
        found = as_sample(batch := self.windows.collate([sample["id"] for sample in samples]), self.pad_idx)
        found["net_input"]["start_indices"] = batch.scored_BT.int().argmax(1).tolist()
        return found


def _row(tokens: Any) -> Tensor:
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))


TokenBlockDataset, MonolingualDataset = TokenBlockAdapter, MonolingualAdapter
LMContextWindowDataset = LMContextWindowAdapter
