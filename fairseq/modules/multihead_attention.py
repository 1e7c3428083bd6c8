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

from fairseq.modules.inference_linear import linear

_ROOM = 4
"""Steps for whose keys a cache has room beforehand; a long one for more."""


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
        self._cache: dict[str, tuple[Tensor, Tensor, int]] = {}  # with room for more columns than are filled
        self._source: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of them so far."""
        old_key, old_value, start = self._cache.get(name, (None, None, 0))
        end = start + key_BHSD.shape[2]
        key_BHSD, value_BHSD = _appended(old_key, key_BHSD, start), _appended(old_value, value_BHSD, start)
        self._cache[name] = (key_BHSD, value_BHSD, end)
        return key_BHSD[:, :, :end], value_BHSD[:, :, :end]

    def attend(self, name: str, query_BTC: Tensor, key_BTC: Tensor, value_BTC: Tensor, num_heads: int) -> Tensor | None:
        """Append as :meth:`extend` does and attend from each query to its text, (B, T, C); None where this cache leaves
        that to the layer, and nothing is appended."""
        return None

    def of_source(self, name: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of the source sentences, made in the first step; one row per sentence."""
        if name not in self._source:
            key_BHSD, value_BHSD = make()
            self._source[name] = (key_BHSD.contiguous(), value_BHSD.contiguous())  # every step reads them
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
        rows = -1 if self.num_words_B is None else len(self.num_words_B)
        if sentences is None and len(order_B) == rows and torch.equal(order_B, torch.arange(rows).to(order_B)):
            return  # every row continues itself, as it does without a beam
        self._cache = {
            name: (k.index_select(0, order_B), v.index_select(0, order_B), length)
            for name, (k, v, length) in self._cache.items()
        }
        if sentences is not None:
            self._source = {name: (k[sentences], v[sentences]) for name, (k, v) in self._source.items()}
        if self.num_words_B is not None:
            self.num_words_B = self.num_words_B[order_B]


def _appended(room_BHSD: Tensor | None, new_BHSD: Tensor, start: int) -> Tensor:
    """The first ``start`` columns of a cache with new ones after them; in place where it has room for them."""
    end = start + new_BHSD.shape[2]
    if room_BHSD is None or room_BHSD.shape[2] < end or torch.is_grad_enabled():
        # Little room: when beams are reordered, it is copied as well.
        larger = new_BHSD.new_empty(*new_BHSD.shape[:2], end + _ROOM + end // 8, new_BHSD.shape[3])
        if room_BHSD is not None:
            larger[:, :, :start] = room_BHSD[:, :, :start]
        room_BHSD = larger
    room_BHSD[:, :, start:end] = new_BHSD
    return room_BHSD


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
        q_BTC, k_BTC, v_BTC = (linear(each, query_BTC) for each in (self.q_proj, self.k_proj, self.v_proj))
        if incremental_state is not None and is_causal:
            attended_BTC = incremental_state.attend(name, q_BTC, k_BTC, v_BTC, self.num_heads)
            if attended_BTC is not None:
                return linear(self.out_proj, attended_BTC)
        q_BHTD, k_BHSD, v_BHSD = (self._heads(each) for each in (q_BTC, k_BTC, v_BTC))
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
        return self._attend(self._heads(linear(self.q_proj, query_BTC)), k_BHSD, v_BHSD, mask_B1S, False).reshape(rows)

    def keys_and_values(self, source_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text, (B, H, S, D)."""
        return self._heads(linear(self.k_proj, source_BSC)), self._heads(linear(self.v_proj, source_BSC))

    def _attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        dropout = self.dropout if self.training else 0.0
        if not is_causal and not dropout and _is_step(q_BHTD, k_BHSD):
            out_BHTD = _attend_by_products(q_BHTD, k_BHSD, v_BHSD, mask)
        else:
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
            )
        out_BTC: Tensor = linear(self.out_proj, out_BHTD.transpose(1, 2).flatten(2))
        return out_BTC

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.view(*x_BTC.shape[:2], self.num_heads, x_BTC.shape[2] // self.num_heads).transpose(1, 2)


def _is_step(q_BHTD: Tensor, k_BHSD: Tensor) -> bool:
    """True for a decoding step's few queries on a CPU, where plain products beat the fused attention.

    Four queries a head of 256 sentences (4 heads, 16 keys of width 32): 0.46 against 0.71 ms on one thread, 0.25
    against 1.62 on two, where the fused one is slower than on one. Products with fewer than 16 keys are slow too.
    """
    few, num_keys = q_BHTD.shape[2] <= 16, k_BHSD.shape[2]
    pays = num_keys >= 16 or (q_BHTD.shape[2] > 1 and torch.get_num_threads() > 1)
    # Keys that do not lie head by head would be copied first.
    in_place = k_BHSD.stride()[2:] == (k_BHSD.shape[3], 1) and k_BHSD.stride(0) == k_BHSD.shape[1] * k_BHSD.stride(1)
    return few and pays and in_place and q_BHTD.device.type == "cpu" and not torch.is_grad_enabled()


def _attend_by_products(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as its formula is written."""
    scores_BHTS = (q_BHTD * q_BHTD.shape[3] ** -0.5) @ k_BHSD.transpose(2, 3)
    if mask is not None:
        scores_BHTS.masked_fill_(~mask, -torch.inf)
    out_BHTD: Tensor = scores_BHTS.softmax(3) @ v_BHSD
    return out_BHTD


def _causal_tail(num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """The last rows of a causal mask; None when the one new query sees everything."""
    if num_queries == 1:
        return None
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return everything.tril(num_keys - num_queries)
