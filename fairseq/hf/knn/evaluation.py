"""Perplexity of a transformers model over a text or over translations, with or without a memory.

Evaluation is offline: the model runs over all batches, positions that count are collected over many of them, and a
memory looks them up in bulk, which is several times faster than at each call.

Shapes: B windows of a batch, T positions, N positions that count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.capture import Capture, capture_key
from fairseq.hf.hooks.inner_model import inner_model, parameters_of
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.knn.batches import Batch, SentencePair, Window, batches
from fairseq.hf.knn.batches import windows_of as windows_of  # programs import it from here
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper

_BULK = 32768
_BULK_BYTES = 256 << 20
"""Positions whose keys are collected before they are looked up, and what these keys may take."""
_SEQUENCE = 512
"""Positions of windows that continue each other that a RetoMaton reads as one: more of them leave fewer to read side by
side, and a sequence begins with a search."""


@dataclass
class TokenScores:
    """Log-probabilities of the scored tokens of a text, in its order."""

    logp_parts: list[Tensor] = field(default_factory=list)
    lm_logp_parts: list[Tensor] = field(default_factory=list)
    target_parts: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def logp(self) -> Tensor:
        """Natural logarithms, float32."""
        return torch.cat(self.logp_parts) if self.logp_parts else torch.empty(0)

    @property
    def lm_logp(self) -> Tensor:
        """The same of the model alone, whatever memory there is."""
        return torch.cat(self.lm_logp_parts) if self.lm_logp_parts else torch.empty(0)

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
    windows: Iterable[Window] | Iterable[SentencePair],
    memory: KNNWrapper | None = None,
    *,
    batch_size: int = 8,
) -> TokenScores:
    """Score the tokens of windows, or the targets of pairs, with a model and the memory attached to it, if any.

    Positions are collected and looked up in bulk, which is several times faster than at each call.

    Args:
        model: in evaluation mode.
        windows: from ``windows_of``; for an encoder-decoder model ``SentencePair``.
        memory: a ``KNNWrapper`` or ``RetomatonWrapper`` attached to the model; None for the model alone.
        batch_size: windows or pairs per forward call; shorter ones are padded on the right.
    Returns: log-probabilities in text order, with ``perplexity`` and ``tokens_per_second``.
    Raises: ValueError when the memory is attached to another model, or the model reads the other kind.

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
        for batch in batches(model, windows, batch_size):
            with torch.inference_mode():
                logits_BTV = model(**batch.inputs(model)).logits
                scores.logp_parts.append(batch.target_logp(logits_BTV).cpu())
            scores.target_parts.append(batch.targets)
        scores.lm_logp_parts = scores.logp_parts
    else:
        with memory.paused(), capture_key(memory.tap) as capture:
            _collect(model, windows, memory, capture, batch_size, scores)
    scores.seconds = time.perf_counter() - started
    return scores


def _collect(
    model: nn.Module,
    windows: Iterable[Window] | Iterable[SentencePair],
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
            scores.lm_logp_parts.append(lm_logp_N)
            scores.target_parts.append(target_N)

    for batch in batches(model, windows, batch_size):
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

    def add(self, key_ND: Tensor, lm_logp_N: Tensor, batch: Batch) -> None:
        """Add the scored positions of a batch. Windows that continue each other are one sequence, up to a length."""
        self.keys.append(key_ND)
        self.lm_logp.append(lm_logp_N)
        self.targets.append(batch.targets)
        for count, continues in zip(batch.is_scored.sum(1).tolist(), batch.continues):
            if continues and self.lengths and self.lengths[-1] + count <= _SEQUENCE:
                self.lengths[-1] += count
            else:
                self.lengths.append(count)


def save_datastore(
    model: nn.Module,
    windows: Iterable[Window] | Iterable[SentencePair],
    saver: KNNSaver,
    *,
    batch_size: int = 8,
) -> int:
    """Run a model over windows so that the saver attached to it keeps their keys. Returns the number of rows so far.

    An encoder-decoder model reads ``SentencePair``, and each token of a target is a row. What an interrupted run has
    saved is skipped. ``saver.break_out()`` then completes the store.

    ```python
    with KNNSaver(dstore_dir="windows-store")(model) as saver:
        save_datastore(model, windows, saver)
    ```
    """
    only_keys = saver.tap.kind is not KeyType.final_hidden and "logits_to_keep" in parameters_of(saver.model)
    few_scores = {"logits_to_keep": 1} if only_keys else {}
    with saver.paused(), capture_key(saver.tap) as capture:
        for batch in batches(model, windows, batch_size):
            if not saver.has_saved(batch.labels_BT, batch.mask):
                inputs = batch.inputs(model)
                with torch.inference_mode():
                    model(**inputs, **({} if "labels" in inputs else few_scores))
                saver.add(capture.take(len(batch.ids_BT)), batch.labels_BT, batch.mask)
    return saver.rows_done
