"""Explanations of a transformers model with a datastore: kNN-LM and RetoMaton.

Shapes: N positions, T tokens of a window, D key width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.config import HfMemoryConfig, HfTextConfig
from fairseq.explorer.explanation import Explanation, top_words
from fairseq.explorer.kinds.hf_text import BATCH_SIZE, HfText
from fairseq.explorer.kinds.retomaton import StepRecord, look_up_text
from fairseq.explorer.live import Opened
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.reading import Found, ModelRun, TypedReader
from fairseq.explorer.rules import INTERPOLATION, Rule, Setting
from fairseq.explorer.text_table import TableWriter
from fairseq.explorer.words import TokenizerWords
from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.identity import vocabulary_size
from fairseq.hf.knn.evaluation import evaluate
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.retomaton.automaton import RetomatonStep
from fairseq.memory.types import Array, Candidates


def open_hf(text_config: HfTextConfig, config: HfMemoryConfig) -> Opened:
    """Open model, store and text; scoring begins when the result is entered.

    Raises: ValueError or OSError when anything does not fit, such as a store of another tokenizer.
    """
    text = HfText.open(text_config)
    shared: dict[str, Any] = {
        "dstore_dir": str(config.dstore_dir),
        "indexfile": config.indexfile,
        "k": config.k,
        "lmbda": config.weight,
        "knn_temp": config.knn_temp,
        "probe": config.probe,
        "knn_keytype": config.knn_keytype,
        "tokenizer": text.tokenizer,
    }
    memory = KNNWrapper(**shared)
    if config.retomaton:
        sizes: dict[str, Any] = {"min_knns": config.min_knns, "max_knns": config.max_knns}
        memory = RetomatonWrapper(members=config.clusters, **sizes, **shared)
    return _LiveHf(text, memory.break_into(text.model)).opened()


class _LiveHf:
    """A model with a memory, whose results are kept token by token."""

    def __init__(self, text: HfText, memory: KNNWrapper) -> None:
        self.text, self.memory, self.lock = text, memory, threading.Lock()
        self.is_retomaton = isinstance(memory, RetomatonWrapper)
        width = memory.memory.k
        if isinstance(memory, RetomatonWrapper):
            width += memory.automaton.max_knns
        more = ["mixed", *(["searched", "pointers"] if self.is_retomaton else [])]
        self.writer = TableWriter(len(text), width, more=more)
        self.writer.write(np.arange(len(text)), counted=True, norm=0.0, **text.columns())
        self.explanation = self._explanation()

    def opened(self) -> Opened:
        """The explanation with what fills it."""
        return Opened(self.explanation, self._fill)

    def _explanation(self) -> Explanation:
        memory, text = self.memory, self.text
        store = memory.memory.store
        size = vocabulary_size(text.model)

        def count() -> Array:
            counts: Array = np.zeros(size, np.int64)
            for part in store.values.chunks:
                counts += np.bincount(part, minlength=size)
            return counts

        explanation = Explanation(
            kind="retomaton" if self.is_retomaton else "knn",
            title=text.title,
            table=self.writer.table,
            neighbors=NeighborTexts(TokenizerWords(text.tokenizer, count), store),
            rule=Rule(INTERPOLATION, only_where_found=True),
            opening=Setting(None if self.is_retomaton else memory.memory.k, memory.lmbda, memory.knn_temp),
            metric="ip" if memory.memory.score == "dot" else memory.memory.index.metric.value,
            unit="group of lines",
            facts={"model": str(text.model.config.name_or_path), "datastore": store.prefix},
            position=self._position,
        )
        explanation.reader = TypedReader(
            explanation, text.encode, self._run, self._look_up, longest=text.size - 1, num_types=size
        )
        return explanation

    def _fill(self, check: Callable[[], None]) -> None:
        """Score the whole text by ``evaluate`` itself, which calls :meth:`target_logp`."""
        self._check, self._done = check, 0
        evaluate(self.text.model, self.text.windows, self, batch_size=BATCH_SIZE)  # type: ignore[arg-type]

    # Of a KNNWrapper, as far as ``evaluate`` uses one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def target_logp(self, key_ND: Tensor, lm_logp_N: Tensor, target_N: Tensor, lengths_B: Tensor) -> Tensor:
        """As the wrapper's, and everything is kept."""
        places_N = self._done + np.arange(len(key_ND))
        steps = StepRecord(self.writer, places_N)

        def record(place: Tensor, found: Candidates | RetomatonStep) -> None:
            if isinstance(found, RetomatonStep):
                steps(place, found)
            else:
                self.writer.write_candidates(places_N[place.numpy()], found)

        with self.lock:
            self.memory.record = record
            try:
                logp_N = self.memory.target_logp(key_ND, lm_logp_N, target_N, lengths_B)
            finally:
                self.memory.record = None
        self.writer.write(places_N, mixed=logp_N.numpy(), lm=lm_logp_N.float().numpy())
        self._done += len(key_ND)
        self._check()
        return logp_N

    # One token, and typed text

    @torch.inference_mode()
    def _position(self, at: int) -> dict[str, Any]:
        window, position = self.text.place(at)
        arrays = self.writer.table.candidates(slice(at, at + 1))
        assert arrays is not None
        also = np.append(arrays.values_nK[0][np.isfinite(arrays.scores_nK[0])], self.writer.table.columns["token"][at])
        with self.lock, self.memory.paused():
            logits_TV = self.text.model(window.ids_T[None].to(self.text.model.device)).logits[0]
        return {"lm": top_words(logits_TV[position].float().log_softmax(0).cpu(), also)}

    @torch.inference_mode()
    def _run(self, tokens: list[int]) -> ModelRun:
        ids_BT = self.text.with_beginning(tokens)
        with self.lock, self.memory.paused(), capture_key(self.memory.tap) as capture:
            logits_TV = self.text.model(ids_BT).logits[0].float().cpu()
            key_ND = capture.take(1)[0].float().cpu()
        norm_N = logits_TV.logsumexp(1)
        lm_logp_T = logits_TV[:-1].gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0] - norm_N[:-1]
        return ModelRun(lm_logp_T, norm_N, key_ND, lambda position: logits_TV[position] - norm_N[position])

    @torch.inference_mode()
    def _look_up(self, key_ND: Tensor, next_N: Tensor) -> Found:
        with self.lock:
            if isinstance(self.memory, RetomatonWrapper):
                return look_up_text(self.memory.automaton, key_ND, next_N)
            found = self.memory.memory.lookup(key_ND)
        assert found.rows_NM is not None
        return Found(found, found.rows_NM)
