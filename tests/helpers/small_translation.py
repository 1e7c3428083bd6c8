"""A small translation model and batches of random sentence pairs, for the tests of losses."""

import torch
from small_models import PAD, SIZE, VOCAB

from fairseq.data.types import TranslationBatch
from fairseq.models.architectures import build_model_config
from fairseq.models.transformer import TransformerModel

ENCODER = {
    "encoder_layers": 1,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_source_positions": 16,
    "share_decoder_input_output_embed": True,
    "decoder_normalize_before": True,
}


def make_translation_model(**given):
    torch.manual_seed(0)
    config = build_model_config("transformer", SIZE | ENCODER | given)
    return TransformerModel.build(config, VOCAB, PAD).double()


def make_pairs(lengths=(7, 4, 6), width=None, seed=1, vocab=VOCAB):
    """Targets of these lengths, padded on the right, each with a source of three words; few types, so many matches."""
    random = torch.Generator().manual_seed(seed)
    tokens_BT = torch.full((len(lengths), width or max(lengths, default=1)), PAD)
    target_BT, scored_BT = tokens_BT.clone(), torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, length in enumerate(lengths):
        words = torch.randint(4, vocab, (length + 1,), generator=random)
        tokens_BT[row, :length], target_BT[row, :length] = words[:-1], words[1:]
        scored_BT[row, :length] = True
    source_BS = torch.randint(4, vocab, (len(lengths), 3), generator=random)
    return TranslationBatch(
        torch.arange(len(lengths)), tokens_BT, target_BT, scored_BT, int(scored_BT.sum()), source_BS
    )
