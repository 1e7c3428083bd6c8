"""Which log-probabilities TRIME's padding of tails touches, and what it makes of them."""

import logging

import pytest
import torch

from fairseq.evaluation.trime_compat import replicate_tail_padding_bug
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel

SIZE, PAD, WIDTH = 40, 1, 16
SMALL = {"decoder_embed_dim": WIDTH, "decoder_ffn_embed_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2}
TIED = {"adaptive_input": True, "tie_adaptive_weights": True, "adaptive_input_factor": 2}


def make(cutoff=None, **more):
    torch.manual_seed(0)
    if "adaptive_input" in more:
        more["adaptive_input_cutoff"] = cutoff
    config = TransformerLMConfig(adaptive_softmax_cutoff=cutoff, adaptive_softmax_factor=2, **SMALL, **more)
    return TransformerLanguageModel.build(config, SIZE, PAD).eval()


def every_type(model):
    """Hidden states, targets and log-probabilities: each type as the target of some positions."""
    target_N = torch.arange(SIZE).repeat(2)
    hidden_ND = torch.randn(len(target_N), WIDTH, generator=torch.Generator().manual_seed(1))
    return hidden_ND, target_N, model.target_logp(hidden_ND, target_N)[0]


def head_entry(model, hidden_D, entry):
    """Log-softmax of one entry of the head, in float64."""
    return (model.decoder.adaptive_softmax.head(hidden_D[None]).double().log_softmax(1)[0, entry]).item()


@pytest.mark.parametrize("tied", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("cutoff", "changed"), [((10,), {11: 10}), ((10, 20), {11: 10, 21: 11}), ((5, 7, 30), None)])
def test_only_the_second_type_of_each_tail_changes(cutoff, changed, tied):
    changed = changed or {6: 5, 8: 6, 31: 7}
    model = make(cutoff, **tied)
    hidden_ND, target_N, logp_N = every_type(model)
    before = logp_N.clone()
    ours = replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N)
    assert torch.equal(logp_N, before)
    for n, token in enumerate(target_N.tolist()):
        if token in changed:
            assert ours[n].item() == pytest.approx(head_entry(model, hidden_ND[n], changed[token]), rel=1e-5)
            assert ours[n] > logp_N[n]
        else:
            assert ours[n] == logp_N[n]


def test_the_tail_alone_is_the_sum_over_its_types():
    model = make((10, 20))
    hidden_ND, target_N, logp_N = every_type(model)
    ours = replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N)
    whole = model.vocab_logp(hidden_ND).exp()
    for token, tail in ((11, slice(10, 20)), (21, slice(20, SIZE))):
        here = target_N == token
        torch.testing.assert_close(ours[here].exp(), whole[here, tail].sum(1))


@pytest.mark.parametrize(("cutoff", "changed"), [((10, 11), {12}), ((10, SIZE - 1), {11})])
def test_a_tail_of_one_type_has_no_second_one(cutoff, changed):
    model = make(cutoff)
    hidden_ND, target_N, logp_N = every_type(model)
    ours = replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N)
    assert set(target_N[ours != logp_N].tolist()) == changed


@pytest.mark.parametrize("shared", [False, True])
def test_a_plain_softmax_has_no_tails(shared):
    model = make(share_decoder_input_output_embed=shared)
    hidden_ND, target_N, logp_N = every_type(model)
    assert replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N) is logp_N


def test_a_text_without_such_types_is_untouched_and_nothing_is_told(caplog):
    model = make((10, 20))
    hidden_ND, target_N, logp_N = every_type(model)
    kept = (target_N != 11) & (target_N != 21)
    with caplog.at_level(logging.DEBUG):
        ours = replicate_tail_padding_bug(model, hidden_ND[kept], target_N[kept], logp_N[kept])
    assert torch.equal(ours, logp_N[kept])
    assert not caplog.records
    with caplog.at_level(logging.DEBUG):
        replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N)
    assert "2 targets 11 scored by their tail alone (--fix-tail-pads)" in caplog.text
    nothing = torch.empty(0)
    assert len(replicate_tail_padding_bug(model, hidden_ND[:0], target_N[:0], nothing)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(dtype):
    model = make((10, 20)).to(dtype)
    hidden_ND, target_N, _ = every_type(make((10, 20)))
    hidden_ND = hidden_ND.to(dtype)
    logp_N, _ = model.target_logp(hidden_ND, target_N)
    ours = replicate_tail_padding_bug(model, hidden_ND, target_N, logp_N)
    assert ours.dtype == logp_N.dtype == torch.float32
    here = (target_N == 21).nonzero()[0, 0]
    assert ours[here].item() == pytest.approx(head_entry(model, hidden_ND[here], 11), rel=1e-3)
