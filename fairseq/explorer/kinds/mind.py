"""Explanations of Extended Mind: what memories inside attention change, and which of them were attended.

Shapes: B rows, H heads, T queries, K memories, V vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.config import HfTextConfig, MindConfig
from fairseq.explorer.explanation import SHOWN_WORDS, Explanation, top_words
from fairseq.explorer.export import content_of
from fairseq.explorer.kinds.hf_text import HfText, not_utf8
from fairseq.explorer.live import Opened
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.reading import LONGEST
from fairseq.explorer.rules import GIVEN, Rule, Setting
from fairseq.explorer.text_table import TableWriter
from fairseq.explorer.words import TokenizerWords
from fairseq.hf.attention.citations import cite
from fairseq.hf.attention.wrapper import ExtendedMind
from fairseq.hf.hooks.identity import vocabulary_size
from fairseq.memory.extended_mind.lookup import SelectedMemories

Selected = Mapping[int, SelectedMemories]
_SHOWN_TOKENS, _CITATIONS, _SPAN = 6, 3, 12


def open_mind(text_config: HfTextConfig, config: MindConfig) -> Opened:
    """Open model, text and memory, which is built here; scoring begins when the result is entered.

    Raises: ValueError or OSError when anything does not fit.
    """
    text = HfText.open(text_config)
    settings: dict[str, Any] = {
        "topk": config.topk,
        "mask_by_sim": config.mask_by_sim,
        "sim_threshold": config.sim_threshold,
        "positions": config.positions,
    }
    mind = ExtendedMind(text.model, tokenizer=text.tokenizer, **settings)
    if config.memory[0].endswith(".safetensors"):
        if len(config.memory) > 1:
            raise ValueError(f"--memory {config.memory[0]} is a whole memory; give it alone, or text files")
        mind.load_memory(config.memory[0])
    else:
        mind.set_memory([_text_of(path) for path in config.memory])
    return _LiveMind(text, mind, config).opened()


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("--memory", path, error) from error


class _LiveMind:
    """A model with memories inside attention, read with and without them."""

    def __init__(self, text: HfText, mind: ExtendedMind, config: MindConfig) -> None:
        self.text, self.mind, self.lock = text, mind.attach(), threading.Lock()
        self.writer = TableWriter(len(text), more=["mixed"])
        self.writer.write(np.arange(len(text)), counted=True, norm=0.0, **text.columns())
        (self.memory,) = mind.memories
        self.words = TokenizerWords(text.tokenizer)
        self.longest = min(LONGEST, text.size - 1)
        self.explanation = Explanation(
            kind="extended-mind",
            title=text.title,
            table=self.writer.table,
            neighbors=NeighborTexts(self.words),
            rule=Rule(GIVEN),
            opening=Setting(),
            unit="group of lines",
            facts={
                "model": str(text.model.config.name_or_path),
                "memory": f"{len(self.memory)} tokens of {', '.join(map(os.path.basename, config.memory))}",
            },
            position=self._position,
            reader=self,
        )

    def opened(self) -> Opened:
        """The explanation with what fills it."""
        return Opened(self.explanation, self._fill)

    def _fill(self, check: Callable[[], None]) -> None:
        done = 0
        for window in self.text.windows:
            ids_BT = window.ids_T[None].to(self.text.model.device)
            first = max(1, window.num_context)
            lm_TV, mixed_TV, _ = self._both(ids_BT)
            target_n = window.ids_T[first:]
            lm_n, mixed_n = (x_TV[first - 1 : -1].gather(1, target_n[:, None])[:, 0] for x_TV in (lm_TV, mixed_TV))
            self.writer.write(done + np.arange(len(target_n)), mixed=mixed_n.numpy(), lm=lm_n.numpy())
            done += len(target_n)
            check()

    @torch.inference_mode()
    def _both(self, ids_BT: Tensor, *, record: bool = False) -> tuple[Tensor, Tensor, Selected]:
        """ln p of every token without and with the memories, both (T, V), and the memories that were attended."""
        with self.lock:
            lm_TV = self.text.model(ids_BT, use_external_mind=False).logits[0]
            mixed_TV = self.text.model(ids_BT, output_retrieved_memory_idx=record).logits[0]
            selected = dict(self.mind.retrieved[0]) if record else {}
        return lm_TV.float().log_softmax(1).cpu(), mixed_TV.float().log_softmax(1).cpu(), selected

    def _position(self, at: int) -> dict[str, Any]:
        window, position = self.text.place(at)
        # The text after the token changes nothing before it.
        ids_BT = window.ids_T[None, : position + 1].to(self.text.model.device)
        lm_TV, mixed_TV, selected = self._both(ids_BT, record=True)
        target = int(self.writer.table.columns["token"][at])
        return self._shown(lm_TV[position], mixed_TV[position], selected, position, target)

    def _shown(
        self, lm_V: Tensor, mixed_V: Tensor, selected: Selected, position: int, target: int | None = None
    ) -> dict[str, Any]:
        best = mixed_V.topk(min(SHOWN_WORDS, len(mixed_V))).indices.numpy()
        lm = top_words(lm_V, best if target is None else np.append(best, target))
        mixed = top_words(mixed_V, np.array(lm["numbers"]))
        return {"lm": lm, "mixed": mixed, "attention": self._attention(selected, position)}

    def _attention(self, selected: Selected, position: int) -> dict[str, Any]:
        """The memories that one query attended to, by layer, and the passages that gave most."""
        layers, step = [], {}
        for number, all_queries in sorted(selected.items()):
            at = slice(position, position + 1)
            one = SelectedMemories(
                all_queries.token_BHTK[:, :, at],
                all_queries.similarity_BHTK[:, :, at],
                all_queries.score_BHTK[:, :, at],
                all_queries.norm_BHT[:, :, at],
            )
            step[number] = one
            layers.append(self._layer(number, one))
        citations = cite([step], self.memory, top=_CITATIONS, span=_SPAN, tokenizer=self.text.tokenizer)
        return {
            "layers": layers,
            "citations": [vars(citation) | {"text": citation.text or ""} for citation in citations],
        }

    def _layer(self, number: int, one: SelectedMemories) -> dict[str, Any]:
        """Share of a layer's attention that memories got, over its heads, and the tokens that got most."""
        token, weight = one.token_BHTK[0].flatten().cpu(), one.weights()[0].flatten().cpu()
        heads = one.token_BHTK.shape[1]
        weight = weight.masked_fill(token < 0, 0.0) / heads
        sums = torch.zeros(len(self.memory.token_N)).index_add_(0, token.clamp(min=0), weight)
        best = sums.topk(min(_SHOWN_TOKENS, len(sums)))
        shown = []
        for share, place in zip(best.values.tolist(), best.indices.tolist()):
            if share > 0:
                document, offset = self.memory.where(place)
                text = self.words.word(int(self.memory.token_N[place]))
                shown.append({"document": document, "place": offset, "text": text, "weight": share})
        return {"layer": number, "share": float(sums.sum()), "tokens": shown}

    # Of a Reader

    def encode(self, text: str) -> list[int]:
        """See ``Reader``."""
        return self.text.encode(text)

    def read(self, tokens: list[int], *, only_next: bool) -> dict[str, Any]:
        """See ``Reader``. Raises: ValueError for a token that the model does not have."""
        size = vocabulary_size(self.text.model)
        for token in tokens:
            if not 0 <= token < size:
                raise ValueError(f"token {token} is not within the {size} of this model")
        lm_TV, mixed_TV, selected = self._both(self.text.with_beginning(tokens), record=True)
        details = self._shown(lm_TV[-1], mixed_TV[-1], selected, len(tokens))
        known = {number for name in ("lm", "mixed") for number in details[name].pop("numbers")}
        details["words"] = {str(token): self.words.word(token) for token in sorted(known)}
        content: dict[str, Any] = {"ids": tokens, "next": details | {"candidates": None}}
        if only_next or not tokens:
            return content
        target_T = torch.tensor(tokens)[:, None]
        writer = TableWriter(len(tokens), more=["mixed"])
        lm_T, mixed_T = (x_TV[:-1].gather(1, target_T)[:, 0].numpy() for x_TV in (lm_TV, mixed_TV))
        writer.write(np.arange(len(tokens)), token=tokens, counted=True, norm=0.0, mixed=mixed_T, lm=lm_T)

        def position(at: int) -> dict[str, Any]:
            return self._shown(lm_TV[at], mixed_TV[at], selected, at, tokens[at])

        typed = replace(
            self.explanation, title="typed text", table=writer.table, notes=(), position=position, reader=None
        )
        return content | content_of(typed, slice(0, len(tokens)))
