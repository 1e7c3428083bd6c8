"""Perplexity of a transformers model over a text, with or without a memory.

Evaluation is offline: the model runs over all batches, positions that count are collected over many of them, and a
memory looks them up in bulk, which is several times faster than at each call.

Shapes: B windows of a batch, T positions, N positions that count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.attachment import IGNORED
from fairseq.hf.hooks.capture import Capture, capture_key
from fairseq.hf.hooks.inner_model import inner_model, parameters_of
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper

_BULK = 32768
_BULK_BYTES = 256 << 20
"""Positions whose keys are collected before they are looked up, and what these keys may take."""
_SEQUENCE = 512
"""Positions of windows that continue each other that a RetoMaton reads as one: more of them leave fewer to read side by
side, and a sequence begins with a search."""
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


@dataclass
class TokenScores:
    """Log-probabilities of the scored tokens of a text, in its order."""

    logp_parts: list[Tensor] = field(default_factory=list)
    target_parts: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def logp(self) -> Tensor:
        """Natural logarithms, float32."""
        return torch.cat(self.logp_parts) if self.logp_parts else torch.empty(0)

    @property
    def targets(self) -> Tensor:
        """The tokens, int64."""
        return torch.cat(self.target_parts) if self.target_parts else torch.empty(0, dtype=torch.int64)

    @property
    def perplexity(self) -> float:
        """exp of the mean of -logp; every token weighs the same."""
        return math.exp(-float(self.logp.double().mean()))

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens over the seconds of the whole evaluation."""
        return len(self.logp) / self.seconds


def evaluate(
    model: nn.Module,
    windows: Iterable[Window],
    memory: KNNWrapper | None = None,
    *,
    batch_size: int = 8,
) -> TokenScores:
    """Score the tokens of windows with a model, and with the memory attached to it, if any.

    Positions are collected and looked up in bulk, which is several times faster than at each call.

    Args:
        model: in evaluation mode; a decoder without an encoder.
        windows: from ``windows_of``.
        memory: a ``KNNWrapper`` or ``RetomatonWrapper`` attached to the model; None for the model alone.
        batch_size: windows per forward call; shorter ones are padded on the right.
    Returns: log-probabilities in text order, with ``perplexity`` and ``tokens_per_second``.
    Raises: ValueError when the memory is attached to another model.

    ```python
    with KNNWrapper(dstore_dir="gpt2-store", k=8, lmbda=0.25)(model) as knn:
        print(evaluate(model, windows, knn).perplexity)
    ```
    """
    if memory is not None and memory.model is not inner_model(model):
        raise ValueError(f"the {type(memory).__name__} is in another model; break it into the one that is evaluated")
    started = time.perf_counter()
    scores = TokenScores()
    if memory is None or memory.lmbda == 0.0:
        for batch in _batches(windows, batch_size):
            with torch.inference_mode():
                logits_BTV = model(**batch.inputs(model)).logits
                scores.logp_parts.append(batch.target_logp(logits_BTV).cpu())
            scores.target_parts.append(batch.targets)
    else:
        with memory.paused(), capture_key(memory.tap) as capture:
            _collect(model, windows, memory, capture, batch_size, scores)
    scores.seconds = time.perf_counter() - started
    return scores


def _collect(
    model: nn.Module,
    windows: Iterable[Window],
    memory: KNNWrapper,
    capture: Capture,
    batch_size: int,
    scores: TokenScores,
) -> None:
    collected = _Collected()

    def look_up() -> None:
        if len(collected):
            key_ND, lm_logp_N, target_N = (
                torch.cat(each) for each in (collected.keys, collected.lm_logp, collected.targets)
            )
            lengths_B = torch.tensor([len(key_ND)] if memory.flattens_batches else collected.lengths)
            scores.logp_parts.append(memory.target_logp(key_ND, lm_logp_N, target_N, lengths_B))
            scores.target_parts.append(target_N)

    for batch in _batches(windows, batch_size):
        with torch.inference_mode():
            logits_BTV = model(**batch.inputs(model)).logits
            lm_logp_N = batch.target_logp(logits_BTV).cpu()
            key_ND = batch.scored(capture.take(len(logits_BTV))).float().cpu()
        collected.add(key_ND, lm_logp_N, batch)
        if memory.flattens_batches or len(collected) >= min(_BULK, _BULK_BYTES // (4 * key_ND.shape[1])):
            look_up()
            collected = _Collected()
    look_up()


class _Collected:
    """Positions whose keys wait for their lookup."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.lm_logp: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return sum(self.lengths)

    def add(self, key_ND: Tensor, lm_logp_N: Tensor, batch: _Batch) -> None:
        """Add the scored positions of a batch. Windows that continue each other are one sequence, up to a length."""
        self.keys.append(key_ND)
        self.lm_logp.append(lm_logp_N)
        self.targets.append(batch.targets)
        for count, continues in zip(batch.is_scored_BT.sum(1).tolist(), batch.continues):
            if continues and self.lengths and self.lengths[-1] + count <= _SEQUENCE:
                self.lengths[-1] += count
            else:
                self.lengths.append(count)


def save_datastore(model: nn.Module, windows: Iterable[Window], saver: KNNSaver, *, batch_size: int = 8) -> int:
    """Run a model over windows so that the saver attached to it keeps their keys. Returns the number of rows so far.

    Windows whose rows an interrupted run has saved are skipped. ``saver.break_out()`` then completes the store.

    ```python
    with KNNSaver(dstore_dir="windows-store")(model) as saver:
        save_datastore(model, windows, saver)
    ```
    """
    only_keys = saver.tap.kind is not KeyType.final_hidden and "logits_to_keep" in parameters_of(saver.model)
    few_scores = {"logits_to_keep": 1} if only_keys else {}
    with saver.paused(), capture_key(saver.tap) as capture:
        for batch in _batches(windows, batch_size):
            if not saver.has_saved(batch.labels, batch.is_text_BT):
                with torch.inference_mode():
                    model(**batch.inputs(model), **few_scores)
                saver.add(capture.take(len(batch.ids_BT)), batch.labels, batch.is_text_BT)
    return saver.rows_done


@dataclass(frozen=True)
class _Batch:
    """Windows side by side, padded on the right."""

    ids_BT: Tensor
    is_text_BT: Tensor
    is_scored_BT: Tensor
    """True where the token is to be predicted, from the place before."""
    continues: list[bool]
    """True for a window whose scored tokens follow those of the window before it."""

    @classmethod
    def of(cls, windows: Sequence[Window]) -> _Batch:
        length_B1 = torch.tensor([[len(window.ids_T)] for window in windows])
        context_B1 = torch.tensor([[max(1, window.num_context)] for window in windows])
        place_1T = torch.arange(int(length_B1.max()))[None]
        ids_BT = torch.nn.utils.rnn.pad_sequence([window.ids_T for window in windows], batch_first=True)
        is_text_BT = place_1T < length_B1
        continues = [window.num_context > 0 for window in windows]
        return cls(ids_BT, is_text_BT, is_text_BT & (place_1T >= context_B1), continues)

    @property
    def labels(self) -> Tensor:
        """Labels as a model takes them."""
        return self.ids_BT.masked_fill(~self.is_scored_BT, IGNORED)

    @property
    def targets(self) -> Tensor:
        """The scored tokens, (N,)."""
        return self.ids_BT[self.is_scored_BT]

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the model. Without a mask where nothing is masked: models are faster so."""
        device = next(model.parameters()).device
        mask = {} if bool(self.is_text_BT.all()) else {"attention_mask": self.is_text_BT.long().to(device)}
        return {"input_ids": self.ids_BT.to(device), "use_cache": False} | mask

    def scored(self, values_BTX: Tensor) -> Tensor:
        """The rows of positions that predict a scored token, (N, X)."""
        return values_BTX[:, :-1][self.is_scored_BT[:, 1:].to(values_BTX.device)]

    def target_logp(self, logits_BTV: Tensor) -> Tensor:
        """Log-probability of the scored tokens, (N,), float32; the scores are cast in groups."""
        rows_N = self.is_scored_BT[:, 1:].to(logits_BTV.device).nonzero()
        target_N = self.targets.to(logits_BTV.device)
        parts = []
        for place_C2, target_C in zip(torch.split(rows_N, _ROWS), torch.split(target_N, _ROWS)):
            scores_CV = logits_BTV[place_C2[:, 0], place_C2[:, 1]].float()
            parts.append(scores_CV.gather(1, target_C[:, None])[:, 0] - scores_CV.logsumexp(1))
        return torch.cat(parts) if parts else torch.empty(0)


def _batches(windows: Iterable[Window], batch_size: int) -> Iterator[_Batch]:
    waiting: list[Window] = []
    for window in windows:
        waiting.append(window)
        if len(waiting) == batch_size:
            yield _Batch.of(waiting)
            waiting = []
    if waiting:
        yield _Batch.of(waiting)
