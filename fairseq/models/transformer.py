"""The transformer with an encoder: a language model of the target that reads a source sentence (arXiv 1706.03762).

Shapes: B sentences, S positions of the source, T of the target, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fairseq.fairseq_names import lazy
from fairseq.models.config import TransformerConfig, require_tap
from fairseq.models.outputs import LMOutput
from fairseq.models.transformer_decoder import TransformerDecoder
from fairseq.models.transformer_encoder import TransformerEncoder
from fairseq.models.transformer_lm import TransformerLanguageModel

if TYPE_CHECKING:
    from fairseq.modules.multihead_attention import Encoded, IncrementalState


class TransformerModel(TransformerLanguageModel):
    """An encoder of the source and a decoder that is a language model given what the encoder made of it."""

    config: TransformerConfig

    def __init__(
        self, config: TransformerConfig, dictionary_size: int, pad: int, source_size: int | None = None
    ) -> None:
        """Args.

        dictionary_size: types of the target.
        source_size: types of the source; by default as many as the target has.
        Raises: ValueError when embeddings are shared by dictionaries of different size.
        """
        nn.Module.__init__(self)
        self.config = config
        self.dictionary_size = dictionary_size
        self.source_size = dictionary_size if source_size is None else source_size
        self.pad = pad
        if config.share_all_embeddings and self.source_size != dictionary_size:
            raise ValueError(
                f"--share-all-embeddings needs one dictionary for both languages; the source's has {self.source_size} "
                f"types, the target's {dictionary_size}: run preprocess.py with --joined-dictionary"
            )
        self.encoder = TransformerEncoder(config, self.source_size, pad)
        self.decoder = TransformerDecoder(
            config,
            dictionary_size,
            pad,
            encoder_width=config.encoder_embed_dim,
            shared_embedding=self.encoder.embed_tokens if config.share_all_embeddings else None,
        )

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()

    @property
    def may_skip_parameters(self) -> bool:
        """See the base class."""
        return super().may_skip_parameters or self.config.encoder_layerdrop > 0

    def encode(self, source_BS: Tensor) -> Encoded:
        """Hidden states of source sentences, int64 (B, S), padded on either side."""
        encoded: Encoded = self.encoder(source_BS)
        return encoded

    def forward(
        self,
        tokens_BT: Tensor,
        key_tap: str | None = None,
        incremental_state: IncrementalState | None = None,
        *,
        source_BS: Tensor | None = None,
        encoded: Encoded | None = None,
    ) -> LMOutput:
        """Inner states of every position; position t has read the source and the target's tokens up to t.

        Args:
            tokens_BT, key_tap, incremental_state: see ``TransformerLanguageModel``.
            source_BS: source sentences; or, instead of them,
            encoded: what :meth:`encode` made of them. Each may have several rows of tokens, one after the other.
        """
        if key_tap is not None:
            require_tap(key_tap)
        if encoded is None:
            assert source_BS is not None, "a translation model was given no source"
            encoded = self.encode(source_BS)
        out: LMOutput = self.decoder(tokens_BT, key_tap, incremental_state, encoded)
        return out


__getattr__, __dir__ = lazy(__name__)
