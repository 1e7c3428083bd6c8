"""What is refused about a model's settings, and how cutoffs may be written."""

import subprocess
import sys

import pytest

from fairseq.config import FlagParser, build, to_dict
from fairseq.models.config import TransformerLMConfig, model_config_from

ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": (5,),
    "adaptive_softmax_cutoff": (5,),
    "tie_adaptive_weights": True,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"character_embeddings": True}, "--character-embeddings is not offered"),
        ({"activation_fn": "swish"}, "'swish' is none of relu"),
        ({"knn_keytype": "ffn"}, "'ffn' is none of last_ffn_input, model_output, separated_head"),
        ({"dropout": 1.0}, r"--dropout 1.0 is not in \[0, 1\)"),
        ({"decoder_layerdrop": -0.1}, "--decoder-layerdrop -0.1"),
        ({"decoder_layers": 0}, "--decoder-layers must be at least 1, got 0"),
        ({"decoder_embed_dim": 10, "decoder_attention_heads": 4}, "10 is not divisible by --decoder-attention-heads 4"),
        ({"max_target_positions": 0}, "--max-target-positions must be at least 1"),
        ({"adaptive_input": True}, "needs --adaptive-input-cutoff"),
        ({"adaptive_softmax_cutoff": (9, 5)}, "9,5 must be positive and ascending"),
        ({"adaptive_softmax_cutoff": "9;5"}, "'9;5' is not a comma-separated list of integers"),
        ({"share_decoder_input_output_embed": True, "adaptive_softmax_cutoff": (5,)}, "--tie-adaptive-weights"),
        ({"share_decoder_input_output_embed": True, "decoder_input_dim": 8}, "is 8, --decoder-output-dim 512"),
        ({"tie_adaptive_weights": True}, "needs --adaptive-input"),
        (ADAPTIVE | {"adaptive_input_cutoff": (6,)}, "must be equal"),
        (ADAPTIVE | {"adaptive_input_factor": 2}, "--adaptive-input-factor 2"),
        (ADAPTIVE | {"decoder_output_dim": 8}, "must be equal"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        TransformerLMConfig(**values)


@pytest.mark.parametrize("cutoff", ["5,9", [5, 9], (5, 9), "[5, 9]"])
def test_cutoffs_as_files_and_overrides_write_them(cutoff):
    assert TransformerLMConfig(adaptive_softmax_cutoff=cutoff).adaptive_softmax_cutoff == (5, 9)


def test_a_config_survives_being_written_as_plain_types():
    config = TransformerLMConfig(**ADAPTIVE, decoder_embed_dim=16, decoder_layers_to_keep=(0, 2))
    assert model_config_from(to_dict(config) | {"arch": "transformer_lm"}) == config


def test_flags_of_the_published_commands():
    parser = FlagParser("train.py", "")
    parser.add_config(TransformerLMConfig)
    words = (
        "--decoder-embed-dim 64 --relu-dropout 0.2 --adaptive-input --adaptive-input-cutoff 20,60 "
        "--adaptive-softmax-cutoff 20,60 --tie-adaptive-weights --tie-adaptive-proj --adaptive-softmax-factor 4 "
        "--decoder-layers-to-keep 0,2 --knn-keytype last_ffn_input --no-decoder-final-norm --max-target-positions 99"
    )
    config = build(TransformerLMConfig, parser.parse(words.split()))
    assert (config.activation_dropout, config.adaptive_input_cutoff, config.decoder_input_dim) == (0.2, (20, 60), 64)
    assert (config.knn_keytype, config.max_target_positions) == ("last_ffn_input", 99)


def test_the_flags_are_made_without_importing_torch():
    program = "import sys, fairseq.models.architectures, fairseq.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
