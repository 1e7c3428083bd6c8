"""The long-term memory: the scored positions of the passages before this one.

Shapes: N scored positions, M positions remembered, D key width.
"""

from __future__ import annotations

import torch

from fairseq.memory.similarity import scaled_products
from fairseq.memory.types import Candidates, Passage


class RollingMemory:
    """Long-term memory: the last ``size`` scored positions of earlier passages. A gap in the text empties it.

    As in TRIME, the context of a passage is in this memory and in its local one too, so a candidate may count twice;
    ``dedup`` drops here what the context repeats.

    Source: arXiv 2205.12674, sec. 3.1.

    ```python
    rolling = RollingMemory(size=512)
    rolling.append(passage)  # after it was scored
    following = Passage(number=1, key_TD=key_ND[6:14], value_T=token_N[6:14], num_context=2)
    rolling.lookup(following).scores_NM.shape  # torch.Size([6, 6])
    ```
    """

    def __init__(self, size: int, *, dedup: bool = False) -> None:
        """Args.

        size: positions that are kept, at least 1.
        dedup: drop the positions that the passage holds as its context.
        Raises: ValueError when size is not positive.
        """
        if size < 1:
            raise ValueError(f"a long-term memory needs --mem-size of at least 1, got {size}")
        self.size, self.dedup = size, dedup
        self.reset()

    def reset(self) -> None:
        """Forget everything: another text begins."""
        self._keys: torch.Tensor | None = None
        self._values = torch.empty(0, dtype=torch.int64)
        self._end = 0
        self._next: int | None = None

    def __len__(self) -> int:
        return min(self._end, self.size)

    def lookup(self, passage: Passage) -> Candidates:
        """Candidates for the scored positions of a passage: the same earlier positions for all of them."""
        if self._next is not None and passage.number != self._next:
            self.reset()
        query_ND = passage.queries
        end = max(0, self._end - passage.num_context) if self.dedup else self._end
        held = slice(max(0, self._end - self.size), end)
        if self._keys is None or held.start >= held.stop:
            nothing_N0 = query_ND.new_empty(len(query_ND), 0, dtype=torch.float32)
            return Candidates(passage.value_T[None, :0], nothing_N0, nothing_N0.bool())
        scores_NM = scaled_products(query_ND, self._keys[held])
        value_1M = self._values[held].clone()[None]  # a copy: the next passages are written over these rows
        return Candidates(value_1M, scores_NM, scores_NM.new_ones(1, 1, dtype=torch.bool).expand_as(scores_NM))

    def append(self, passage: Passage) -> None:
        """Add the scored positions of a passage, after it was scored."""
        key_ND, value_N = passage.queries[-self.size :], passage.targets[-self.size :]
        self._next = passage.number + 1
        if self._keys is None:
            # Twice the size: positions are moved to the front once per ``size`` of them, not with every passage.
            self._keys = key_ND.new_empty(2 * self.size, key_ND.shape[1])
            self._values = value_N.new_empty(2 * self.size, dtype=torch.int32)  # tokens are compared in 32 bits
        if self._end + len(key_ND) > len(self._keys):
            kept = slice(self._end - (self.size - len(key_ND)), self._end)
            count = kept.stop - kept.start
            self._keys[:count], self._values[:count] = self._keys[kept].clone(), self._values[kept].clone()
            self._end = count
        self._keys[self._end : self._end + len(key_ND)] = key_ND
        self._values[self._end : self._end + len(key_ND)] = value_N
        self._end += len(key_ND)
