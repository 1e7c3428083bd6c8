"""State dicts of several fairseq versions load into the same model."""

import pytest
import torch

from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel

SMALL = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_layers": 1, "decoder_attention_heads": 2}


def make(seed, **more):
    torch.manual_seed(seed)
    return TransformerLanguageModel.build(TransformerLMConfig(**SMALL | more), 12, 1)


def assert_loads(state, **settings):
    source, target = make(0, **settings), make(1, **settings)
    target.load_state_dict(state)
    for (name, value), other in zip(source.named_parameters(), target.parameters()):
        assert torch.equal(value, other), name


def test_output_matrix_of_version_0_9():
    state = make(0).state_dict()
    state["decoder.embed_out"] = state.pop("decoder.output_projection.weight")
    assert_loads(state)


def test_shared_matrix_is_written_once_by_version_0_9_and_twice_by_0_12():
    state = make(0, share_decoder_input_output_embed=True).state_dict()
    assert_loads(state, share_decoder_input_output_embed=True)
    del state["decoder.output_projection.weight"]
    assert_loads(state, share_decoder_input_output_embed=True)
    with pytest.raises(RuntimeError, match="output_projection"):
        make(1).load_state_dict(state)


def test_queries_keys_and_values_in_one_matrix():
    state = make(0).state_dict()
    for kind in ("weight", "bias"):
        parts = [state.pop(f"decoder.layers.0.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
        state[f"decoder.layers.0.self_attn.in_proj_{kind}"] = torch.cat(parts)
    assert_loads(state)


def test_numbered_norms():
    state = make(0).state_dict()
    for number, name in enumerate(["self_attn_layer_norm", "final_layer_norm"]):
        for kind in ("weight", "bias"):
            value = state.pop(f"decoder.layers.0.{name}.{kind}")
            state[f"decoder.layers.0.layer_norms.{number}.{kind}"] = value
    assert_loads(state)


def test_markers_come_and_go_between_versions():
    state = make(0).state_dict()
    del state["decoder.version"], state["decoder.embed_positions._float_tensor"]
    state["decoder.embed_positions.weights"] = torch.zeros(3, 8)
    state["decoder.some_module.version"] = torch.ones(1)
    assert_loads(state)


def test_other_names_are_still_errors():
    state = make(0).state_dict()
    state["decoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="decoder.extra.weight"):
        make(1).load_state_dict(state)
