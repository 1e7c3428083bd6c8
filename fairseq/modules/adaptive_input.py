"""Embeddings that are narrower for rarer tokens (arXiv 1809.10853). Shapes: B batch, T time, N = B * T, D width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def bands_of(cutoff: Sequence[int], dictionary_size: int, flag: str) -> list[int]:
    """The upper end of each band of the vocabulary.

    Raises: ValueError when the dictionary is smaller than the cutoffs.
    """
    if cutoff[-1] > dictionary_size:
        raise ValueError(
            f"{flag} {','.join(map(str, cutoff))} reaches beyond the dictionary of {dictionary_size} types; "
            "give smaller cutoffs"
        )
    return [*cutoff, dictionary_size] if cutoff[-1] < dictionary_size else list(cutoff)


def band_width(width: int, factor: float, band: int, flag: str) -> int:
    """Width of a band, ``factor`` times smaller than that of the one before.

    Raises: ValueError when nothing is left of it.
    """
    found = int(width // factor**band)
    if found < 1:
        raise ValueError(
            f"{flag} {factor:g}: band {band} of width {width} has no dimension left; give a smaller factor"
        )
    return found


class AdaptiveInput(nn.Module):
    """A band of embeddings and a projection to the common width for each part of the vocabulary."""

    def __init__(
        self, dictionary_size: int, pad: int, first_width: int, factor: float, width: int, cutoff: Sequence[int]
    ) -> None:
        """Args.

        first_width: width of the first band's embeddings.
        width: of what comes out.
        cutoff: where bands end; the last one ends with the vocabulary.
        """
        super().__init__()
        self.ends = bands_of(cutoff, dictionary_size, "--adaptive-input-cutoff")
        self.width = width
        self.pad = pad
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's files have one; it means nothing
        self.embeddings = nn.ModuleList()
        for band, (low, high) in enumerate(zip([0, *self.ends], self.ends)):
            inner = band_width(first_width, factor, band, "--adaptive-input-factor")
            embedding = nn.Embedding(high - low, inner, padding_idx=pad if low <= pad < high else None)
            self.embeddings.append(nn.Sequential(embedding, nn.Linear(inner, width, bias=False)))

    def bands(self) -> list[tuple[nn.Embedding, nn.Linear]]:
        """Embedding and projection of each band, the most frequent tokens first."""
        return [(band[0], band[1]) for band in self.embeddings]  # type: ignore[index]

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for embedding, projection in self.bands():
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)
            if embedding.padding_idx is not None:
                nn.init.zeros_(embedding.weight[embedding.padding_idx])
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Embed tokens, (B, T, D)."""
        token_N = tokens_BT.flatten()
        places, pieces = [], []
        for low, high, band in zip([0, *self.ends], self.ends, self.embeddings):
            # A band without tokens takes part too: its gradient is zero, not absent, whatever the batch holds.
            here = ((token_N >= low) & (token_N < high)).nonzero().squeeze(1)
            places.append(here)
            pieces.append(band(token_N[here] - low))
        piece_ND = torch.cat(pieces)
        out_ND = torch.empty_like(piece_ND).index_copy(0, torch.cat(places), piece_ND)
        return out_ND.view(*tokens_BT.shape, self.width)
