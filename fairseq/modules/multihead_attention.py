"""Attention with several heads, and the cache that makes decoding step by step cheap.

Shapes: B batch, T queries, S keys, H heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of the source sentences that a decoder attends to."""

    hidden_BSC: Tensor
    """Its output."""
    visible_BS: Tensor | None
    """bool, False on padding; None when nothing is padding."""

    def rows(self, index_N: Tensor) -> Encoded:
        """The sentences of these numbers."""
        return Encoded(self.hidden_BSC[index_N], None if self.visible_BS is None else self.visible_BS[index_N])


class IncrementalState:
    """Keys and values of the tokens read so far, per layer; pass the same one to every step of one text."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Columns read so far, padding included."""
        self.num_words_B: Tensor | None = None
        """Tokens read so far that are not padding, per row."""
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        self._source: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of them so far."""
        if name in self._cache:
            old_key, old_value = self._cache[name]
            key_BHSD = torch.cat([old_key, key_BHSD], dim=2)
            value_BHSD = torch.cat([old_value, value_BHSD], dim=2)
        self._cache[name] = (key_BHSD, value_BHSD)
        return key_BHSD, value_BHSD

    def of_source(self, name: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of the source sentences, made in the first step; one row per sentence."""
        if name not in self._source:
            self._source[name] = make()
        return self._source[name]

    def advance(self, is_word_BT: Tensor) -> None:
        """Count tokens that every layer has read."""
        counts_B = is_word_BT.sum(1)
        self.num_words_B = counts_B if self.num_words_B is None else self.num_words_B + counts_B
        self.num_tokens += is_word_BT.shape[1]

    def reorder(self, order_B: Tensor, sentences: Tensor | None = None) -> None:
        """Take over the rows ``order_B`` of the cache: beam search continues some rows and drops others.

        Args:
            sentences: numbers of the source sentences that remain, when some do not.
        """
        self._cache = {
            name: (k.index_select(0, order_B), v.index_select(0, order_B)) for name, (k, v) in self._cache.items()
        }
        if sentences is not None:
            self._source = {name: (k[sentences], v[sentences]) for name, (k, v) in self._source.items()}
        if self.num_words_B is not None:
            self.num_words_B = self.num_words_B[order_B]


class MultiheadAttention(nn.Module):
    """Attention as in arXiv 1706.03762, sec. 3.2, with fairseq's parameter names."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0, key_width: int | None = None) -> None:
        """Args.

        width: of the queries and of the output.
        key_width: of what is attended to, when it is not ``width`` (an encoder's output).
        """
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.k_proj = nn.Linear(key_width or width, width)
        self.v_proj = nn.Linear(key_width or width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Draw the initial weights; three inputs of one width count as one matrix of three times the height.

        Their biases are drawn too, as fairseq's are (the standard deviations in its trained models show it).
        """
        same_width = self.k_proj.in_features == self.q_proj.in_features
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2) if same_width else 1)
            bound = 1 / math.sqrt(projection.in_features)
            nn.init.uniform_(projection.bias, -bound, bound)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query_BTC: Tensor,
        *,
        mask_BTS: Tensor | None = None,
        is_causal: bool = False,
        incremental_state: IncrementalState | None = None,
        name: str = "",
    ) -> Tensor:
        """Attend from each query to the queries' own text.

        Args:
            mask_BTS: True where a query may look; broadcast over what is missing.
            is_causal: position t sees positions up to t. Texts are padded on the right only, so that padding comes
                after every token it might disturb and needs no mask of its own.
            incremental_state: the keys read so far, extended by these; ``name`` distinguishes the layers.
        """
        q_BHTD = self._heads(self.q_proj(query_BTC))
        k_BHSD, v_BHSD = self.keys_and_values(query_BTC)
        if incremental_state is not None:
            k_BHSD, v_BHSD = incremental_state.extend(name, k_BHSD, v_BHSD)
            if is_causal:
                mask_BTS, is_causal = _causal_tail(q_BHTD.shape[2], k_BHSD.shape[2], q_BHTD.device), False
        return self._attend(q_BHTD, k_BHSD, v_BHSD, mask_BTS, is_causal)

    def to_source(
        self, query_NTC: Tensor, source: Encoded, incremental_state: IncrementalState | None = None, name: str = ""
    ) -> Tensor:
        """Attend from each query to its source sentence.

        Args:
            query_NTC: N rows, as many for each of the B source sentences, one sentence's after another's; a
                sentence's keys are then read once for all of its rows.
            incremental_state: keeps the keys of the source; ``name`` distinguishes the layers.
        """
        if incremental_state is None:
            k_BHSD, v_BHSD = self.keys_and_values(source.hidden_BSC)
        else:
            k_BHSD, v_BHSD = incremental_state.of_source(name, lambda: self.keys_and_values(source.hidden_BSC))
        rows = query_NTC.shape
        per_sentence = rows[0] * rows[1] // max(1, len(k_BHSD))  # -1 cannot be told of a batch without sentences
        query_BTC = query_NTC.reshape(len(k_BHSD), per_sentence, rows[2])  # the order of queries means nothing here
        mask_B1S = None if source.visible_BS is None else source.visible_BS[:, None]
        return self._attend(self._heads(self.q_proj(query_BTC)), k_BHSD, v_BHSD, mask_B1S, False).reshape(rows)

    def keys_and_values(self, source_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text, (B, H, S, D)."""
        return self._heads(self.k_proj(source_BSC)), self._heads(self.v_proj(source_BSC))

    def _attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHSD,
            v_BHSD,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        out_BTC: Tensor = self.out_proj(out_BHTD.transpose(1, 2).flatten(2))
        return out_BTC

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.view(*x_BTC.shape[:2], self.num_heads, x_BTC.shape[2] // self.num_heads).transpose(1, 2)


def _causal_tail(num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """The last rows of a causal mask; None when the one new query sees everything."""
    if num_queries == 1:
        return None
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return everything.tril(num_keys - num_queries)
