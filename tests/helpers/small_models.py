"""A small language model and batches of random tokens, for the tests of losses."""

import torch

from fairseq.data.types import LMBatch
from fairseq.models.architectures import build_model_config
from fairseq.models.transformer_lm import TransformerLanguageModel

PAD, VOCAB = 1, 30
PLAIN = {"share_decoder_input_output_embed": True}
ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": (10, 20),
    "adaptive_softmax_cutoff": (10, 20),
    "tie_adaptive_weights": True,
    "adaptive_softmax_factor": 2.0,
    "adaptive_input_factor": 2.0,
}
SIZE = {
    "decoder_layers": 2,
    "decoder_embed_dim": 16,
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
    "max_target_positions": 16,
}


def make_model(**given):
    torch.manual_seed(0)
    model = TransformerLanguageModel.build(build_model_config("transformer_lm", SIZE | given), VOCAB, PAD)
    return model.double()


def make_batch(lengths=(7, 4, 6), context=0, width=None, seed=1, vocab=VOCAB):
    """Rows of random tokens, padded on the right; the first ``context`` positions of each are not scored."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BT = torch.full((len(lengths), width or max(lengths, default=0)), PAD)
    target_BT, scored_BT = tokens_BT.clone(), torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, length in enumerate(lengths):
        words = torch.randint(4, vocab, (length + 1,), generator=draw)
        tokens_BT[row, :length], target_BT[row, :length] = words[:-1], words[1:]
        scored_BT[row, context:length] = True
    return LMBatch(torch.arange(len(lengths)), tokens_BT, target_BT, scored_BT)
