"""The language model: what its inner states are, what it must not see, and fairseq's names."""

import math

import pytest
import torch

from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules.multihead_attention import IncrementalState

SIZE, PAD = 40, 1
SMALL = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 2}
ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": (10, 20),
    "adaptive_softmax_cutoff": (10, 20),
    "adaptive_input_factor": 2,
    "adaptive_softmax_factor": 2,
}
TIED = ADAPTIVE | {"tie_adaptive_weights": True, "tie_adaptive_proj": True}
VARIANTS = {
    "plain": {},
    "shared": {"share_decoder_input_output_embed": True},
    "post_norm": {"decoder_normalize_before": False},
    "no_final_norm": {"no_decoder_final_norm": True},
    "learned_positions": {"decoder_learned_pos": True, "layernorm_embedding": True},
    "no_positions": {"no_token_positional_embeddings": True, "no_scale_embedding": True},
    "projections": {"decoder_input_dim": 12, "decoder_output_dim": 8, "activation_fn": "gelu"},
    "adaptive": ADAPTIVE,
    "tied": TIED,
    "adaptive_output_only": {"adaptive_softmax_cutoff": (10,), "decoder_output_dim": 8},
}


def make(variant="plain", **more):
    torch.manual_seed(0)
    config = TransformerLMConfig(**SMALL | VARIANTS[variant] | more)
    return TransformerLanguageModel.build(config, SIZE, PAD).eval()


def text(rows=2, length=7):
    torch.manual_seed(1)
    return torch.randint(4, SIZE, (rows, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_what_comes_after_it(variant):
    model, tokens = make(variant), text()
    changed = tokens.clone()
    changed[:, 4:] = text(2, 3).flip(1)
    before, after = model(tokens, "last_ffn_input"), model(changed, "last_ffn_input")
    torch.testing.assert_close(before.hidden_BTD[:, :4], after.hidden_BTD[:, :4])
    torch.testing.assert_close(before.key_BTD[:, :4], after.key_BTD[:, :4])
    assert not torch.allclose(before.hidden_BTD[:, 4:], after.hidden_BTD[:, 4:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_on_the_right_changes_nothing(variant):
    model, tokens = make(variant), text()
    padded = torch.cat([tokens, torch.full((2, 3), PAD)], 1)
    torch.testing.assert_close(model(padded).hidden_BTD[:, :7], model(tokens).hidden_BTD)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_in_steps_equals_one_pass(variant):
    model, tokens = make(variant), text()
    state = IncrementalState()
    parts = [model(part, "last_ffn_input", state) for part in tokens.split([1, 1, 3, 2], 1)]
    whole = model(tokens, "last_ffn_input")
    torch.testing.assert_close(torch.cat([p.hidden_BTD for p in parts], 1), whole.hidden_BTD)
    torch.testing.assert_close(torch.cat([p.key_BTD for p in parts], 1), whole.key_BTD)


@pytest.mark.parametrize("variant", VARIANTS)
def test_target_is_one_entry_of_a_distribution(variant):
    model, tokens = make(variant), text()
    hidden, target = model(tokens).hidden_BTD.flatten(0, 1), text(2, 7).flatten().flip(0)
    dense = model.vocab_logp(hidden)
    assert dense.shape == (14, SIZE)
    torch.testing.assert_close(dense.logsumexp(1), torch.zeros(14))
    logp, norm = model.target_logp(hidden, target)
    torch.testing.assert_close(logp, dense.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(model.vocab_scores(hidden), dense + norm[:, None])
    for chunk in (1, 5, 14, 99):
        torch.testing.assert_close(model.target_logp(hidden, target, chunk), (logp, norm))


def test_log_sum_is_of_all_types_or_of_the_head():
    plain, tied, tokens = make(), make("tied"), text()
    hidden = plain(tokens).hidden_BTD[0]
    scores = hidden @ plain.decoder.output_projection.weight.t()
    torch.testing.assert_close(plain.target_logp(hidden, tokens[0])[1], scores.logsumexp(1))
    hidden = tied(tokens).hidden_BTD[0]
    head = tied.decoder.adaptive_softmax.head
    scores = torch.cat([hidden @ head.word_proj.weight.t(), hidden @ head.class_proj.weight.t()], 1)
    assert scores.shape == (7, 12)
    torch.testing.assert_close(tied.target_logp(hidden, tokens[0])[1], scores.logsumexp(1))


@pytest.mark.parametrize("variant", ["plain", "no_final_norm", "post_norm", "projections"])
def test_taps(variant):
    model, tokens = make(variant), text()
    seen = {}
    last = model.decoder.layers[-1]
    last.fc1.register_forward_hook(lambda module, inputs, output: seen.update(read=inputs[0]))
    out = model(tokens, "last_ffn_input")
    torch.testing.assert_close(out.key_BTD, seen["read"])
    assert out.key_BTD.shape[2] == model.key_dim("last_ffn_input")
    top = model(tokens, "model_output")
    assert top.key_BTD is top.hidden_BTD
    assert top.key_BTD.shape[2] == model.key_dim("model_output")
    assert model(tokens).key_BTD is None
    with pytest.raises(ValueError, match="'ffn' is none of"):
        model(tokens, "ffn")


def test_the_output_of_a_layer_is_what_the_next_one_reads():
    model, tokens, seen = make(decoder_layers=3), text(), []
    model.decoder.layers[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert torch.equal(model(tokens, "layer_1").key_BTD, seen[0])
    last = model(tokens, "layer_3")
    assert torch.equal(model.decoder.layer_norm(last.key_BTD), last.hidden_BTD)
    assert last.key_BTD.shape[2] == model.key_dim("layer_3")
    with pytest.raises(ValueError, match="layer_4: the model has 3 layers; give layer_1 to layer_3"):
        model.key_dim("layer_4")
    with pytest.raises(ValueError, match="'layer_0' is none of last_ffn_input"):
        model(tokens, "layer_0")


def test_what_the_first_layer_reads():
    model, tokens = make("learned_positions", layernorm_embedding=False), text()
    decoder = model.decoder
    expected = math.sqrt(16) * decoder.embed_tokens.weight[tokens] + decoder.embed_positions.weight[2:9]
    torch.testing.assert_close(decoder.embed(tokens, None), expected)


def test_names_are_fairseqs():
    names = set(make("tied").state_dict())
    layer = [
        *(f"self_attn.{p}_proj.{kind}" for p in ("k", "v", "q", "out") for kind in ("weight", "bias")),
        *(
            f"{p}.{kind}"
            for p in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
            for kind in ("weight", "bias")
        ),
    ]
    assert names == {
        "decoder.version",
        "decoder.embed_tokens._float_tensor",
        *(f"decoder.embed_tokens.embeddings.{band}.{i}.weight" for band in range(3) for i in range(2)),
        "decoder.embed_positions._float_tensor",
        *(f"decoder.layers.{i}.{name}" for i in range(2) for name in layer),
        "decoder.layer_norm.weight",
        "decoder.layer_norm.bias",
        "decoder.adaptive_softmax.version",
        "decoder.adaptive_softmax.head._float_tensor",
        "decoder.adaptive_softmax.head.word_proj.weight",
        "decoder.adaptive_softmax.head.class_proj.weight",
        *(f"decoder.adaptive_softmax.tail.{i}.{j}.weight" for i in range(2) for j in (0, 2)),
    }
    others = set(make("projections", decoder_learned_pos=True).state_dict())
    for name in ("project_in_dim", "project_out_dim", "output_projection", "embed_positions", "embed_tokens"):
        assert f"decoder.{name}.weight" in others


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_drawn(variant, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).mul_(math.nan))
    config = TransformerLMConfig(**SMALL | VARIANTS[variant])
    unfilled = TransformerLanguageModel.unfilled(config, SIZE, PAD)
    assert all(value.isnan().all() for value in unfilled.parameters())
    for name, value in TransformerLanguageModel.build(config, SIZE, PAD).named_parameters():
        assert torch.isfinite(value).all(), name


def test_padding_is_embedded_as_zero():
    assert not make().decoder.embed_tokens.weight[PAD].any()
    assert not make("tied").decoder.embed_tokens(torch.tensor([[PAD]])).any()


def test_initial_spread():
    model = make(decoder_embed_dim=64, decoder_input_dim=32)
    decoder = model.decoder
    assert decoder.embed_tokens.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert decoder.output_projection.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert decoder.layers[0].fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 24)), rel=0.02)
    assert not decoder.layers[0].fc1.bias.any()


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_batch_without_blocks_trains_nothing_and_everything_gets_a_gradient(variant):
    model = make(variant).train()
    out = model(torch.empty(0, 3, dtype=torch.long))
    logp, _ = model.target_logp(out.hidden_BTD.flatten(0, 1), torch.empty(0, dtype=torch.long))
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradients_reach_every_weight():
    model = make("tied").train()
    tokens = torch.arange(4, SIZE)[None]
    logp, _ = model.target_logp(model(tokens).hidden_BTD[0], tokens[0].flip(0))
    logp.sum().backward()
    assert all(p.grad.any() for p in model.parameters())


def test_layerdrop_leaves_layers_out_in_training_but_never_the_tapped_one():
    model, tokens = make(decoder_layerdrop=0.999, dropout=0.0), text()
    decoder = model.decoder
    calls = []
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(tokens)
    assert calls == [0, 1]
    calls.clear()
    model.train()
    assert model(tokens, "last_ffn_input").key_BTD is not None
    assert calls == [1]
    model(tokens)
    assert calls == [1]


def test_longest_input():
    assert make().longest_input is None
    model = make("learned_positions", max_target_positions=6)
    assert model.longest_input == model.max_positions == 6
    with pytest.raises(ValueError, match="7 tokens is longer than the 6 positions"):
        model(text())


def test_fewer_layers_when_some_are_kept():
    assert len(make(decoder_layers_to_keep=(1,)).decoder.layers) == 1


def test_dictionary_smaller_than_the_cutoffs():
    with pytest.raises(ValueError, match="10,20 reaches beyond the dictionary of 15 types"):
        TransformerLanguageModel.build(TransformerLMConfig(**SMALL | TIED), 15, PAD)


def test_half_precision_runs():
    model, tokens = make("tied"), text()
    exact = model.target_logp(model(tokens).hidden_BTD[0], tokens[0])[0]
    model = model.bfloat16()
    out = model(tokens, "last_ffn_input")
    assert out.key_BTD.dtype == torch.bfloat16
    logp = model.target_logp(out.hidden_BTD[0], tokens[0])[0]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact, atol=0.2, rtol=0)
