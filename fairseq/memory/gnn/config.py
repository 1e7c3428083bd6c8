"""Options of GNN-LM: its graph and its attention layers. No torch here: the flags are made from these."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_at_least, require_within
from fairseq.config.flags import int_list

DEFAULT_BAND = 1536
"""Nearest neighbours of train tokens that the original takes."""
BUILDERS = ("occurrence", "dedup")
MEANS = ("two", "present", "learned")
STARTS = ("zero", "reference")
MAX_LAYERS = 64
"""Most layers: a window then reaches 63 positions each way, beyond any use."""


def window(text: str) -> tuple[int, ...]:
    """Parse ``2``, for both sides, or ``(2,1)``, left and right. Raises: UnreadableError when it is anything else."""
    sides = int_list(text.strip("()[] "))
    return sides * 2 if len(sides) == 1 else sides


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Neighbours and their windows, as a block of text sees them (arXiv 2110.08743, sec. 2.2)."""

    neighbor_context: tuple[int, ...] = flag("--neighbor-context", default=(2, 2), parse=window)
    """Positions read to the left and to the right of a neighbour: one number for both, or (left,right)."""
    band: int | None = flag("--invalid-neighbor-context", default=None)
    """In training, drop neighbours nearer than this in the text to the token they are for; by default the band that
    they were searched with, or else 1536. No neighbour has read a token that it helps to predict if this is the
    language model's context and a block's tokens together."""
    exclude_own_document: bool = flag("--exclude-own-document", default=False)
    """In training, drop neighbours of the token's own document too."""
    stop_at_documents: bool = flag("--stop-at-documents", default=False)
    """End the windows where a document ends; by default they go on into the next one."""
    windows_cross_band: bool = flag("--windows-cross-band", default=False)
    """In training, let the window of a neighbour just outside of the band reach into it, as the original does."""
    graph_builder: str = flag("--graph-builder", default="occurrence", choices=BUILDERS)
    """occurrence: each neighbour has a window of its own. dedup: the windows of a block are one, as the original has
    it; it leaks later tokens' neighbours where a window is shorter than the layers reach."""

    def __post_init__(self) -> None:
        sides = self.neighbor_context
        if isinstance(sides, (str, int)):  # as checkpoints of the original have it
            object.__setattr__(self, "neighbor_context", window(str(sides)))
        if len(self.neighbor_context) != 2:
            raise ValueError(f"--neighbor-context {self.neighbor_context} is not one number or two; give (2,2), say")
        for side in self.neighbor_context:
            require_within(0, LARGEST_COUNT, neighbor_context=side)
        require_at_least(0, invalid_neighbor_context=self.band)
        if self.graph_builder not in BUILDERS:
            raise ValueError(f"--graph-builder {self.graph_builder} is not one of {', '.join(BUILDERS)}")

    @property
    def nearest(self) -> int:
        """Nearest neighbours that are taken in training, in tokens."""
        return DEFAULT_BAND if self.band is None else self.band

    def safe_band(self, context: int, block: int) -> int:
        """Smallest band with which nothing that a token reads has read that token.

        The key of position p has read the tokens from p - context to p - 1. A token at i reads what its block's tokens
        u <= i read of their neighbours, who are at u + band or later: beyond i + context for every u if the band is
        context + block. A window that reaches into the band adds its left side.

        Args:
            context: tokens that the language model reads before a position, at most, when features are made.
            block: tokens of a block.
        """
        return context + block + (self.neighbor_context[0] if self.windows_cross_band else 0)


@dataclass(frozen=True, kw_only=True)
class GnnConfig:
    """Attention layers over a graph of neighbours (arXiv 2110.08743, sec. 2.3; heterogeneous graph transformer)."""

    graph_layer: int = flag("--graph-layer", default=3)
    """Layers; a token reads num_layers - 1 positions to each side of a neighbour, as far as its window goes."""
    graph_attention_heads: int = flag("--graph-attention-heads", default=8)
    """Attention heads."""
    decoder_gcn_dim: int = flag("--decoder-gcn-dim", default=0)
    """Width of the layers; 0 is the width of the language model's states."""
    graph_dropout: float = flag("--graph-dropout", default=0.1)
    """Share of each layer's update that is dropped in training."""
    graph_attention_dropout: float = flag("--graph-attention-dropout", default=0.1)
    """Share of the attention weights that are dropped in training."""
    intra_context: int = flag("--intra-context", default=0)
    """Tokens of its own text that a token reads, itself included; 0 is all before it."""
    no_intra_edges: bool = flag("--no-intra-edges", default=False)
    """Let tokens read their neighbours only, not their own text."""
    graph_mean: str = flag("--graph-mean", default="two", choices=MEANS)
    """Mean of what a token reads of its text and of its neighbours. two: half of each, also without neighbours;
    present: its text alone where there are none; learned: a share per layer and head, half at the start."""
    graph_start: str = flag("--graph-start", default="zero", choices=STARTS)
    """zero: before training the output is the language model's state; reference: the original's weights and output."""
    graph_recompute: bool = flag("--graph-recompute", default=False)
    """In training, compute the neighbours' states once more in the backward pass instead of keeping what leads to
    them: less memory, and more time."""

    def __post_init__(self) -> None:
        require_within(1, MAX_LAYERS, graph_layer=self.graph_layer)
        require_at_least(1, graph_attention_heads=self.graph_attention_heads)
        require_at_least(0, decoder_gcn_dim=self.decoder_gcn_dim, intra_context=self.intra_context)
        for name, value in (("dropout", self.graph_dropout), ("attention-dropout", self.graph_attention_dropout)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"--graph-{name} {value} is not in [0, 1); 0 drops nothing")
        for name, chosen, known in (("mean", self.graph_mean, MEANS), ("start", self.graph_start, STARTS)):
            if chosen not in known:
                raise ValueError(f"--graph-{name} {chosen} is not one of {', '.join(known)}")

    def width(self, dim: int) -> int:
        """Width of the layers over states of width ``dim``. Raises: ValueError when the heads do not divide it."""
        width = self.decoder_gcn_dim or dim
        if width % self.graph_attention_heads:
            raise ValueError(
                f"--graph-attention-heads {self.graph_attention_heads} does not divide the width {width}; give a "
                "divisor of it, or another --decoder-gcn-dim"
            )
        return width
