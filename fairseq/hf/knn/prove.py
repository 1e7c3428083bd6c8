"""Proofs beside the perplexity of a transformers model: mass, causality, order, and disjointness of text and store.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.inner_model import inner_model
from fairseq.hf.knn.batches import SentencePair, Window
from fairseq.memory.proof.budget import SHARE, Budget
from fairseq.memory.proof.config import ProofConfig
from fairseq.memory.proof.overlap import overlap
from fairseq.memory.proof.tally import CausalityTally, MassTally, OrderTally, is_in_half, rounding_of
from fairseq.memory.proof.texts import other_tokens
from fairseq.memory.proof.ties import has_tied_end
from fairseq.metrics.verdicts import Proof, Verdict

if TYPE_CHECKING:
    from fairseq.hf.knn.evaluation import TokenScores
    from fairseq.hf.knn.wrapper import KNNWrapper

_CUTS = 4
"""Places of a window after which its text is changed, with ``prove="all"``."""


@torch.inference_mode()
def prove(
    model: nn.Module,
    windows: Sequence[Window],
    scores: TokenScores,
    memory: KNNWrapper | None = None,
    *,
    positions: str = "sample",
    seed: int = 0,
) -> Proof:
    """Check the scores of ``evaluate``: some windows are read once more, alone, with the memory in the model.

    Args:
        model: in evaluation mode.
        windows: those that were evaluated.
        scores: of ``evaluate``; they must be of the distributions found here.
        memory: attached to the model; None for the model alone, or for a memory of another kind that is attached.
        positions: how many are checked, or ``all``; ``sample``: as many as take less than 2% of the evaluation's time.
        seed: of the positions.
    Returns: verdicts, whose ``to_dict()`` belongs beside the perplexity.
    Raises: ValueError when the memory is attached to another model, the windows are pairs of sentences, or
        ``positions`` is none of these.

    ```python
    with KNNWrapper(dstore_dir="gpt2-store", k=8, lmbda=0.25)(model) as knn:
        scores = evaluate(model, windows, knn)
        print(prove(model, windows, scores, knn).passed)
    ```
    """
    if memory is not None and memory.model is not inner_model(model):
        raise ValueError(f"the {type(memory).__name__} is in another model; break it into the one that was evaluated")
    if any(isinstance(window, SentencePair) for window in windows):
        raise ValueError("pairs of sentences are scored with their sources, which prove does not read; give windows")
    return _Prover(model, windows, scores, memory, ProofConfig(prove=positions), seed).prove()


class _Prover:
    def __init__(
        self,
        model: nn.Module,
        windows: Sequence[Window],
        scores: TokenScores,
        memory: KNNWrapper | None,
        config: ProofConfig,
        seed: int,
    ) -> None:
        self.model, self.windows, self.scores, self.memory, self.config = model, windows, scores, memory, config
        self.device = next(model.parameters()).device
        self.budget = Budget(config, len(windows), seed)
        self.mass, self.order = MassTally(is_in_half([model])), OrderTally()
        self.causality = CausalityTally(rounding_of([model]))
        counts = [max(0, len(window.ids_T) - max(1, window.num_context)) for window in windows]
        self.first_W = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """Place of each window's first scored token among all."""

    def prove(self) -> Proof:
        """Check positions until they are as many as asked for, or the time is spent."""
        store = None if self.memory is None else self.memory.memory.store
        rows_before = 0 if store is None else len(store)
        counts_before = self._counts()
        scored = np.flatnonzero(np.diff(self.first_W) > 0)
        for number in self.budget.random.permutation(scored).tolist() if len(scored) else ():
            if not self._goes_on():
                break
            with self.budget:
                self._check_window(number)
        self._restore(counts_before)
        with self.budget:
            if store is not None:
                self.order.see_store(store.prefix, rows_before, len(store), -1)
            disjointness = self._disjointness(store)
        verdicts = (self.mass.verdict(), self.causality.verdict(), self.order.verdict(), disjointness)
        seconds = self.budget.seconds
        return Proof(verdicts, self.budget.num_positions, seconds, seconds / max(self.scores.seconds + seconds, 1e-9))

    def _goes_on(self) -> bool:
        if self.config.takes_all:
            return True
        if self.config.count is not None:
            return self.budget.num_positions < self.config.count
        return not self.budget.num_positions or self.budget.seconds < SHARE * self.scores.seconds

    def _check_window(self, number: int) -> None:
        window, random = self.windows[number], self.budget.random
        first, count = int(self.first_W[number]), int(self.first_W[number + 1] - self.first_W[number])
        wanted = _CUTS if self.config.takes_all else 1
        if self.config.count is not None:  # spread evenly over what is left
            wanted = -(-(self.config.count - self.budget.num_positions) // len(self.windows))
        cuts = sorted(random.choice(count, min(count, wanted), replace=False).tolist())
        logp_TV = self._logp(window.ids_T)
        start = len(window.ids_T) - count
        for n in range(count) if self.config.takes_all else cuts:
            place = start + n - 1  # the position that predicts the token
            self.budget.num_positions += 1
            self.mass.masses.append(float(logp_TV[place].double().exp().sum()))
            if self._reads_alone(window):
                own, reported = float(logp_TV[place, window.ids_T[place + 1]]), float(self.scores.logp[first + n])
                self.mass.compare(own, reported, functools.partial(self._is_tied, window.ids_T, place))
        for n in cuts:
            place = start + n - 1
            changed_TV = self._logp(self._with_other_tokens(window.ids_T, place))
            self.causality.num_cuts += 1
            self.causality.compare("the distribution", logp_TV[: place + 1], changed_TV[: place + 1])

    def _is_tied(self, ids_T: Tensor, place: int) -> bool:
        memory = self.memory
        if memory is None:
            return False
        with memory.paused(), capture_key(memory.tap) as capture:
            self.model(input_ids=ids_T[None].to(self.device), use_cache=False)
            key_TD = capture.take(1)[0]
        return has_tied_end(memory.memory, key_TD[place])

    def _reads_alone(self, window: Window) -> bool:
        """False for a window whose scores rest on the one before it, which it is read without here."""
        from fairseq.hf.knn.retomaton import RetomatonWrapper

        return not (isinstance(self.memory, RetomatonWrapper) and (window.num_context or self.memory.flattens_batches))

    def _logp(self, ids_T: Tensor) -> Tensor:
        """Log-probability of every type after each token, (T, V) float32: as the model gives it to any program."""
        logits_TV = self.model(input_ids=ids_T[None].to(self.device), use_cache=False).logits[0].float()
        # With a memory they are log-probabilities already, and their sums are what is to be shown.
        is_mixed = self.memory is not None and self.memory.lmbda > 0.0
        return logits_TV if is_mixed else torch.log_softmax(logits_TV, 1)

    def _with_other_tokens(self, ids_T: Tensor, place: int) -> Tensor:
        """The text with other tokens after a position."""
        size = int(self.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        other_T = ids_T.clone()
        other_T[place + 1 :] = other_tokens(other_T[place + 1 :], 0, size, self.budget.random)
        return other_T

    def _counts(self) -> tuple[int, int] | None:
        """A RetoMaton's counts of positions and searches, which are figures of the evaluation."""
        if not hasattr(self.memory, "num_searched"):
            return None
        memory: Any = self.memory
        return memory.num_positions, memory.num_searched

    def _restore(self, counts: tuple[int, int] | None) -> None:
        if counts is not None:
            memory: Any = self.memory
            memory.num_positions, memory.num_searched = counts

    def _disjointness(self, store: Any) -> Verdict:
        if store is None:
            return Verdict("disjointness", None, "there is no datastore")
        targets = self.scores.targets.numpy().astype(np.int64)
        starts = np.unique(self.first_W[:-1][np.diff(self.first_W) > 0])
        return overlap(targets, starts, store.values, store.deleted).verdict(store.prefix, "window")
