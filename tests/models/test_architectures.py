"""Named sizes: the numbers fairseq's and TRIME's names stand for, and known parameter counts."""

import pytest
import torch

from fairseq.models.architectures import ARCHITECTURES, build_model_config
from fairseq.models.transformer_lm import TransformerLanguageModel

# layers, width, inner width, heads, dropout, of attention, of activations, activation, final norm
PLAIN = {
    "transformer_lm": (6, 512, 2048, 8, 0.1, 0.0, 0.0, "relu", True),
    "transformer_lm_gnn": (6, 512, 2048, 8, 0.1, 0.0, 0.0, "relu", True),
    "transformer_lm_big": (12, 1024, 4096, 16, 0.1, 0.0, 0.0, "relu", True),
    "transformer_lm_wiki103_small_sm": (8, 128, 512, 4, 0.3, 0.1, 0.1, "relu", True),
    "transformer_lm_wiki103_150M": (16, 410, 2100, 10, 0.3, 0.1, 0.1, "relu", True),
    "transformer_lm_enwik8": (12, 512, 2048, 8, 0.3, 0.1, 0.1, "relu", True),
    "transformer_lm_baevski_gbw": (12, 512, 4096, 16, 0.1, 0.1, 0.0, "relu", False),
    "transformer_lm_gbw": (12, 512, 4096, 16, 0.1, 0.1, 0.0, "relu", False),
    "transformer_lm_gpt": (12, 768, 3072, 12, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_tiny": (2, 64, 64, 1, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_big_wide": (24, 2048, 8192, 32, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_bigger": (48, 2048, 8192, 32, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_small": (24, 1024, 4096, 16, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_medium": (36, 1280, 5120, 20, 0.1, 0.1, 0.0, "gelu", True),
    "transformer_lm_gpt2_big": (48, 1600, 6400, 25, 0.1, 0.1, 0.0, "gelu", True),
}
# arXiv 2005.14165, table 2.1; widths and heads of some sizes are rounded in fairseq.
GPT3 = {
    f"transformer_lm_gpt3_{name}": (layers, width, 4 * width, heads, 0.0, 0.0, 0.0, "gelu", True)
    for name, layers, width, heads in (
        ("small", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large", 24, 1536, 16),
        ("xl", 24, 2048, 32),
        ("2_7", 32, 2560, 32),
        ("6_7", 32, 4096, 32),
        ("13", 40, 5120, 40),
        ("175", 96, 12288, 96),
    )
}
PLAIN |= GPT3
ADAPTIVE = {
    "transformer_lm_baevski_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False),
    "transformer_lm_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False),
    "transformer_lm_gnn_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False),
    "transformer_lm_wiki103_small": (8, 512, 2048, 8, 0.3, 0.1, 0.1, "relu", False),
}


# layers, width, inner width, heads, dropout, of attention, of activations, pre-norm; encoder and decoder alike
TRANSLATION = {
    "transformer": (6, 512, 2048, 8, 0.1, 0.0, 0.0, False),
    "transformer_tiny": (2, 64, 64, 2, 0.1, 0.0, 0.0, False),
    "transformer_iwslt_de_en": (6, 512, 1024, 4, 0.1, 0.0, 0.0, False),
    "transformer_wmt_en_de": (6, 512, 2048, 8, 0.1, 0.0, 0.0, False),
    "transformer_vaswani_wmt_en_de_big": (6, 1024, 4096, 16, 0.3, 0.0, 0.0, False),
    "transformer_vaswani_wmt_en_fr_big": (6, 1024, 4096, 16, 0.1, 0.0, 0.0, False),
    "transformer_wmt_en_de_big": (6, 1024, 4096, 16, 0.3, 0.1, 0.0, False),
    "transformer_wmt_en_de_big_t2t": (6, 1024, 4096, 16, 0.3, 0.1, 0.1, True),
}


def test_every_name_is_listed_here():
    assert set(ARCHITECTURES) == PLAIN.keys() | ADAPTIVE.keys() | TRANSLATION.keys()


@pytest.mark.parametrize("name", sorted(TRANSLATION))
def test_numbers_of_translation_models(name):
    config = build_model_config(name, {})
    layers, width, inner, heads, dropout, attention, activations, pre_norm = TRANSLATION[name]
    for side in ("encoder", "decoder"):
        found = [getattr(config, f"{side}_{what}") for what in ("layers", "embed_dim", "ffn_embed_dim")]
        assert found == [layers, width, inner]
        assert getattr(config, f"{side}_attention_heads") == heads
        assert getattr(config, f"{side}_normalize_before") is pre_norm
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (dropout, attention, activations)


@pytest.mark.parametrize("name", sorted(PLAIN | ADAPTIVE))
def test_numbers(name):
    config = build_model_config(name, {})
    layers, width, inner, heads, dropout, attention, activations, activation, final_norm = (PLAIN | ADAPTIVE)[name]
    assert (config.decoder_layers, config.decoder_attention_heads) == (layers, heads)
    assert {config.decoder_embed_dim, config.decoder_input_dim, config.decoder_output_dim} == {width}
    assert config.decoder_ffn_embed_dim == inner
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (dropout, attention, activations)
    assert config.activation_fn == activation
    assert config.decoder_learned_pos is config.share_decoder_input_output_embed is (name in GPT3)
    assert config.decoder_normalize_before
    assert config.no_decoder_final_norm != final_norm
    adaptive = (
        config.adaptive_input_cutoff,
        config.adaptive_softmax_cutoff,
        config.adaptive_softmax_dropout,
        config.tie_adaptive_weights,
        config.tie_adaptive_proj,
    )
    both = (20000, 60000)
    assert adaptive == ((both, both, 0.2, True, True) if name in ADAPTIVE else (None, None, 0.0, False, False))


@pytest.mark.parametrize(
    ("name", "types", "millions"),
    [
        ("transformer_lm_wiki103", 267744, 247),  # the figures of the papers
        ("transformer_lm_enwik8", 208, 38),
    ],
)
def test_parameter_count(name, types, millions):
    model = TransformerLanguageModel.unfilled(build_model_config(name, {}), types, 1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_what_the_user_gives_is_laid_over():
    config = build_model_config("transformer_lm_wiki103", {"decoder_embed_dim": 64, "dropout": 0.0, "lr": 1.0})
    assert (config.decoder_input_dim, config.decoder_output_dim, config.decoder_layers) == (64, 64, 16)
    assert config.dropout == 0


def test_unknown_name():
    with pytest.raises(ValueError, match="did you mean 'transformer_lm_wiki103'"):
        build_model_config("transformer_lm_wiki13", {})


def test_a_model_of_every_name_runs_when_made_small():
    small = {"decoder_layers": 1, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 8, "decoder_attention_heads": 2}
    for name, given in ARCHITECTURES.items():
        cutoffs = {k: (10, 20) for k in ("adaptive_input_cutoff", "adaptive_softmax_cutoff") if given.get(k)}
        model = TransformerLanguageModel.build(build_model_config(name, small | cutoffs), 30, 1).eval()
        out = model(torch.tensor([[2, 5, 29]]))
        logp, _ = model.target_logp(out.hidden_BTD[0], torch.tensor([5, 29, 12]))
        assert torch.isfinite(logp).all(), name
