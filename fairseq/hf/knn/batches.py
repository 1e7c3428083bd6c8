"""What a model reads at once: windows of a text, or pairs of source and target, side by side in a batch.

Shapes: B sequences of a batch, S source positions, T positions of the decoder, N positions that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.attachment import IGNORED
from fairseq.hf.hooks.inner_model import inner_model
from fairseq.hf.hooks.seq2seq import is_seq2seq, shifted_labels

_ROWS = 256
"""Positions whose scores are cast to float32 at a time."""


@dataclass(frozen=True)
class Window:
    """A piece of a text that a model reads at once."""

    ids_T: Tensor
    """int64 tokens."""
    num_context: int = 0
    """Tokens at the start that are read and not scored: an earlier window has scored them. The first token of a text is
    never scored, for nothing is before it."""


@dataclass(frozen=True)
class SentencePair:
    """A source and its target, which an encoder-decoder model reads at once.

    ```python
    pair = SentencePair(source_T=torch.tensor([5, 9, 1]), target_T=torch.tensor([7, 1]))  # 1: the end of a sentence
    ```
    """

    source_T: Tensor
    """int64 tokens of the encoder."""
    target_T: Tensor
    """int64 tokens to predict, as labels have them: each is scored, the first one and the end too."""


def windows_of(ids: Sequence[int] | Tensor, size: int, stride: int | None = None, *, tail: bool = True) -> list[Window]:
    """Cut a text into windows that score each token but the first once.

    Args:
        ids: token ids of the text.
        size: tokens per window.
        stride: tokens from one window's start to the next; by default ``size``: then the first token of each window is
            not scored either, because nothing in the window is before it.
        tail: keep the tokens that do not fill a last window; False cuts the text to a multiple of ``size`` first.
    Raises: ValueError unless 1 <= stride <= size.

    ```python
    windows = windows_of(range(40), size=16, stride=8)
    [(len(window.ids_T), window.num_context) for window in windows]  # [(8, 0), (16, 8), (16, 8), ...]
    ```
    """
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"stride {stride} is not within 1 and the window's {size} tokens; tokens would be skipped")
    ids_N = torch.as_tensor(ids, dtype=torch.int64)
    if not tail:
        ids_N = ids_N[: len(ids_N) // size * size]
    found: list[Window] = []
    for first in range(0, len(ids_N), stride):  # a window ends with the tokens it scores, so the first ones are short
        start = max(0, first + stride - size)
        window = Window(ids_N[start : first + stride], first - start)
        if len(window.ids_T) > max(1, window.num_context):
            found.append(window)
    return found


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded on the right."""

    ids_BT: Tensor
    """What the model reads; of an encoder-decoder model the sources, (B, S)."""
    is_text_BT: Tensor
    """False at the padding of ``ids_BT``."""
    labels_BT: Tensor
    """Labels as the model takes them."""
    target_BT: Tensor
    """The token to predict at each position of the decoder, ``IGNORED`` where none is scored."""
    continues: list[bool]
    """True for a window whose scored tokens follow those of the window before it."""
    has_source: bool = False

    @classmethod
    def of_windows(cls, windows: Sequence[Window]) -> Batch:
        """Windows of texts."""
        ids_BT, is_text_BT = _side_by_side([window.ids_T for window in windows])
        context_B1 = torch.tensor([[max(1, window.num_context)] for window in windows])
        is_scored_BT = is_text_BT & (torch.arange(ids_BT.shape[1])[None] >= context_B1)
        labels_BT = ids_BT.masked_fill(~is_scored_BT, IGNORED)
        target_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        return cls(ids_BT, is_text_BT, labels_BT, target_BT, [window.num_context > 0 for window in windows])

    @classmethod
    def of_pairs(cls, pairs: Sequence[SentencePair]) -> Batch:
        """Sources and targets."""
        ids_BS, is_text_BS = _side_by_side([pair.source_T for pair in pairs])
        target_BT, is_target_BT = _side_by_side([pair.target_T for pair in pairs])
        target_BT = target_BT.masked_fill(~is_target_BT, IGNORED)
        return cls(ids_BS, is_text_BS, target_BT, target_BT, [False] * len(pairs), has_source=True)

    @property
    def mask(self) -> Tensor | None:
        """The mask of the positions that ``labels_BT`` are of; None where these say it all."""
        return None if self.has_source else self.is_text_BT

    @property
    def is_scored(self) -> Tensor:
        """True at the positions that predict a scored token."""
        return self.target_BT != IGNORED

    @property
    def targets(self) -> Tensor:
        """The scored tokens, (N,)."""
        return self.target_BT[self.is_scored]

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the model. Without a mask where nothing is masked: models are faster so."""
        device = next(model.parameters()).device
        named: dict[str, Any] = {"input_ids": self.ids_BT.to(device), "use_cache": False}
        if not bool(self.is_text_BT.all()):
            named["attention_mask"] = self.is_text_BT.long().to(device)
        if not self.has_source:
            return named
        labels = self.labels_BT.to(device)
        decoder_ids = shifted_labels(inner_model(model), labels)
        return named | ({"labels": labels} if decoder_ids is None else {"decoder_input_ids": decoder_ids})

    def scored(self, values_BTX: Tensor) -> Tensor:
        """The rows of positions that predict a scored token, (N, X)."""
        return values_BTX[self.is_scored.to(values_BTX.device)]

    def target_logp(self, logits_BTV: Tensor) -> Tensor:
        """Log-probability of the scored tokens, (N,), float32; the scores are cast in groups."""
        place_N2 = self.is_scored.to(logits_BTV.device).nonzero()
        target_N = self.targets.to(logits_BTV.device)
        parts = []
        for place_C2, target_C in zip(torch.split(place_N2, _ROWS), torch.split(target_N, _ROWS)):
            scores_CV = logits_BTV[place_C2[:, 0], place_C2[:, 1]].float()
            parts.append(scores_CV.gather(1, target_C[:, None])[:, 0] - scores_CV.logsumexp(1))
        return torch.cat(parts) if parts else torch.empty(0)


def batches(model: nn.Module, pieces: Iterable[Window] | Iterable[SentencePair], batch_size: int) -> Iterator[Batch]:
    """Batches of windows, or of pairs for a model with an encoder.

    Raises: ValueError when the model reads the other kind. Given windows, BART would make targets of them by itself.
    """
    has_source = is_seq2seq(inner_model(model))
    waiting: list[Any] = []
    for piece in pieces:
        if isinstance(piece, SentencePair) != has_source:
            reads = "has an encoder and reads SentencePair(source, target)" if has_source else "reads Window(ids)"
            raise ValueError(f"{type(inner_model(model)).__name__} {reads}; got a {type(piece).__name__}")
        waiting.append(piece)
        if len(waiting) == batch_size:
            yield _batch(waiting, has_source=has_source)
            waiting = []
    if waiting:
        yield _batch(waiting, has_source=has_source)


def _batch(pieces: Sequence[Any], *, has_source: bool) -> Batch:
    return Batch.of_pairs(pieces) if has_source else Batch.of_windows(pieces)


def _side_by_side(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences padded on the right, and where they are text, both (B, T)."""
    length_B1 = torch.tensor([[len(ids_T)] for ids_T in sequences])
    ids_BT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return ids_BT, torch.arange(ids_BT.shape[1])[None] < length_B1
