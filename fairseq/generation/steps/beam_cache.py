"""A cache of keys and values that beams share: which tokens a text has read is a table, and only that is reordered.

Beam search continues some rows twice and drops others. Copying their keys and values in every step takes longer than
reading them; here each token's are written once, and attention finds those of a row by its table.

Shapes: R rows, B rows of a batch, T tokens, N tokens kept, C width of all heads, H heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.multihead_attention import IncrementalState
from fairseq.runtime.threads import openmp_team

_ROOM = 4  # steps for which there is room at first; a quarter more whenever it ends


class BeamCache(IncrementalState):
    """Keys and values of beams on a CPU in float32; see ``IncrementalState``."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, tuple[Tensor, Tensor, int]] = {}
        """Keys and values of a layer, (N, C), and how many of the rows are filled."""
        self._token_RT = torch.empty(0, 0, dtype=torch.int32)
        """Row of the keys of each text's tokens, the same in all layers, those included that some layers have yet to
        read."""
        self._num_kept = 0

    def extend(self, name: str, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; copies what is kept, which :meth:`attend` does not."""
        shape = key_BHSD.shape
        key_NC, value_NC = self._append(name, *(x.transpose(1, 2).flatten(2) for x in (key_BHSD, value_BHSD)))
        rows, tokens = self._token_RT.shape
        key_BSC, value_BSC = (x[self._token_RT.flatten()].view(rows, tokens, -1) for x in (key_NC, value_NC))
        heads = (*key_BSC.shape[:2], shape[1], shape[3])
        return key_BSC.view(heads).transpose(1, 2), value_BSC.view(heads).transpose(1, 2)

    def attend(self, name: str, query_BTC: Tensor, key_BTC: Tensor, value_BTC: Tensor, num_heads: int) -> Tensor | None:
        """See the base class; of one query for each row."""
        if query_BTC.shape[1] != 1 or query_BTC.dtype != torch.float32 or not query_BTC.numel():
            return None
        from fairseq.generation.steps import attention_kernels

        key_NC, value_NC = self._append(name, key_BTC, value_BTC)
        query_RC, out_RC = query_BTC[:, 0].contiguous(), torch.empty(len(query_BTC), query_BTC.shape[2])
        query, key, value, token, out = (x.numpy() for x in (query_RC, key_NC, value_NC, self._token_RT, out_RC))
        team, threads = openmp_team()
        attention_kernels.attend(query, key, value, token, num_heads, out, team, threads)
        return out_RC[:, None]

    def _append(self, name: str, key_BTC: Tensor, value_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new tokens; returns all of them."""
        rows, tokens, width = key_BTC.shape
        old_key, old_value, start = self._kept.get(name, (None, None, 0))
        end = start + rows * tokens
        if start == self._num_kept:  # the first layer
            new_RT = torch.arange(start, end, dtype=torch.int32).view(rows, tokens)
            self._token_RT = torch.cat([self._token_RT.view(rows, -1), new_RT], 1)
            self._num_kept = end
        kept = []
        for old_NC, new_BTC in ((old_key, key_BTC), (old_value, value_BTC)):
            if old_NC is None or len(old_NC) < end:
                larger = new_BTC.new_empty(end + end // 4 + _ROOM * rows, width)
                if old_NC is not None:
                    larger[:start] = old_NC[:start]
                old_NC = larger
            old_NC[start:end].view(rows, tokens, width).copy_(new_BTC)
            kept.append(old_NC)
        self._kept[name] = (kept[0], kept[1], end)
        return kept[0], kept[1]

    def reorder(self, order_B: Tensor, sentences: Tensor | None = None) -> None:
        """See the base class; no keys are copied."""
        if self._num_kept:  # texts may end before the first step: a source without words
            self._token_RT = self._token_RT[order_B]
        super().reorder(order_B, sentences)
