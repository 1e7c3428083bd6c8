"""Keys are what the layer reads and returns, recomputed by hand from the model's own hidden states."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, SEQ2SEQ, inputs, make

from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import TAPS, find_tap

pytestmark = pytest.mark.usefixtures("no_grad")


def hidden_states(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What enters each decoder layer, and what leaves the last one after the final norm."""
    out = model(**call, output_hidden_states=True, use_cache=False)
    return list(out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states)


def last_layer_inputs(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Inputs of every module of the model in one call, by name: an observation apart from taps."""
    seen: list[tuple[str, torch.Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(
                module.register_forward_hook(
                    lambda _, given, out, name=name: seen.append((name, given[0] if given else None, out))
                )
            )
    model(**call, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# The last decoder layer, written down by hand: the module that makes the key, and the block (or its last map).
BY_HAND = {
    "gpt2": ("transformer.h.1.ln_2", "transformer.h.1.mlp"),
    "gpt_neo": ("transformer.h.1.ln_2", "transformer.h.1.mlp"),
    "gpt_neox": ("gpt_neox.layers.1.post_attention_layernorm", "gpt_neox.layers.1.mlp"),
    "opt": ("model.decoder.layers.1.final_layer_norm", "model.decoder.layers.1.fc2"),
    "llama": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "mistral": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "qwen2": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "qwen3": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "gemma": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "gemma2": ("model.layers.1.pre_feedforward_layernorm", "model.layers.1.mlp"),
    "gemma3_text": ("model.layers.1.pre_feedforward_layernorm", "model.layers.1.mlp"),
    "phi": ("model.layers.1.input_layernorm", "model.layers.1.mlp"),
    "phi3": ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp"),
    "bart": ("model.decoder.layers.1.encoder_attn_layer_norm", "model.decoder.layers.1.fc2"),
    "marian": ("model.decoder.layers.1.encoder_attn_layer_norm", "model.decoder.layers.1.fc2"),
    "mbart": ("model.decoder.layers.1.final_layer_norm", "model.decoder.layers.1.fc2"),
    "m2m_100": ("model.decoder.layers.1.final_layer_norm", "model.decoder.layers.1.fc2"),
    "t5": ("decoder.block.1.layer.2.layer_norm", "decoder.block.1.layer.2.DenseReluDense"),
}


def test_every_architecture_has_its_case():
    assert set(BY_HAND) == set(CONFIGS) == set(TAPS)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_key_is_the_layer_input_recomputed_by_hand(name):
    model = make(name)
    call = inputs(model)
    norm, block = BY_HAND[name]
    outputs = {path: out for path, _, out in last_layer_inputs(model, call)}
    batch, length = call["labels"].shape
    for kind, path in ((KeyType.last_ffn_input, norm), (KeyType.last_ffn_output, block)):
        with capture_key(find_tap(model, kind)) as capture:
            model(**call, use_cache=False)
        key = capture.take(batch)
        assert key.shape == (batch, length, find_tap(model, kind).dim)
        expected = outputs[path][0] if isinstance(outputs[path], tuple) else outputs[path]
        torch.testing.assert_close(key, expected.view(key.shape), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_final_hidden_makes_the_logits(name):
    model = make(name)
    call = inputs(model)
    tap = find_tap(model, KeyType.final_hidden)
    with capture_key(tap) as capture:
        logits = model(**call, use_cache=False).logits
    key = capture.take(len(logits))
    assert key.shape[-1] == tap.dim
    again = torch.nn.functional.linear(key, tap.module.weight, getattr(tap.module, "bias", None))
    if hasattr(model, "final_logits_bias"):
        again = again + model.final_logits_bias
    cap = getattr(model.config, "final_logit_softcapping", None)
    again = torch.tanh(again / cap) * cap if cap else again
    torch.testing.assert_close(again, logits)


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bart", "gpt2"])
def test_discovery_finds_what_the_table_says(name, monkeypatch):
    model = make(name)
    known = [find_tap(model, kind).module for kind in KeyType]
    monkeypatch.delitem(TAPS, name)
    assert all(find_tap(model, kind).module is module for kind, module in zip(KeyType, known))


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_have_the_models_type(name, dtype):
    model = make(name).to(dtype)
    call = inputs(model)
    with capture_key(find_tap(model, KeyType.last_ffn_input)) as capture:
        model(**call)
    key = capture.take(3)
    assert key.dtype is dtype
    assert key.isfinite().all()


def test_an_unknown_architecture_is_told_what_it_has(monkeypatch):
    model = make("llama")
    monkeypatch.delitem(TAPS, "llama")
    for layer in model.model.layers:
        layer.strange = layer.mlp
        del layer.mlp
    with pytest.raises(ValueError, match=r"model.layers \(2 x LlamaDecoderLayer: .*strange.*final_hidden"):
        find_tap(model, KeyType.last_ffn_input)
    assert find_tap(model, KeyType.final_hidden).module is model.lm_head


def test_a_call_that_passes_no_tap_is_an_error():
    model = make("gpt2")
    with (
        capture_key(find_tap(model, KeyType.last_ffn_input)) as capture,
        pytest.raises(ValueError, match="did not pass"),
    ):
        capture.take(1)


def test_the_hooks_are_gone_when_the_block_fails():
    model = make("gpt2")
    tap = find_tap(model, KeyType.last_ffn_input)
    with pytest.raises(RuntimeError), capture_key(tap):
        raise RuntimeError
    assert not tap.module._forward_pre_hooks


def test_a_seq2seq_model_is_tapped_in_its_decoder():
    for name in SEQ2SEQ:
        assert "decoder" in find_tap(make(name), KeyType.last_ffn_input).path
