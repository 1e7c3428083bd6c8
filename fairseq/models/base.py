"""The interface of language models: what criterions, scoring and evaluation need of one.

Shapes: B blocks, T positions, N any choice of positions, D width, V types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Parameter

    from fairseq.models.config import TransformerLMConfig
    from fairseq.models.outputs import LMOutput


class LanguageModel(Protocol):
    """A causal language model; ``TransformerLanguageModel`` is ours, plug-ins bring others."""

    training: bool
    pad: int
    """Token that fills up blocks."""

    @property
    def config(self) -> TransformerLMConfig:
        """The settings the model was made with."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest input the model is made for, in tokens."""
        ...

    @property
    def has_adaptive_softmax(self) -> bool:
        """True if the output layer is an adaptive softmax (arXiv 1609.04309)."""
        ...

    @property
    def decoder(self) -> Any:
        """The module that holds the output layer."""
        ...

    def __call__(self, tokens_BT: Tensor, key_tap: str | None = None, **source: Any) -> LMOutput:
        """Inner states of every position, and the state at a tap as memory key.

        Args:
            source: what the model reads besides its own text (``batch.source``).
        """
        ...

    def key_dim(self, key_tap: str) -> int:
        """Width of the memory keys read at a tap. Raises: ValueError for a tap the model does not have."""
        ...

    def target_logp(self, hidden_ND: Tensor, target_N: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and log-sum of the vocabulary, both (N,) in float32."""
        ...

    def vocab_logp(self, hidden_ND: Tensor) -> Tensor:
        """Log-probability of every type, (N, V) in float32."""
        ...

    def parameters(self) -> Iterator[Parameter]:
        """The weights."""
        ...
