"""Positions count from pad + 1 and skip padding; sinusoids follow the published formula."""

import math

import pytest
import torch

from fairseq.modules.positional_embedding import (
    LearnedPositionalEmbedding,
    SinusoidalPositionalEmbedding,
    positions_of,
)

PAD = 1
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 4, PAD, PAD]])


def test_positions_skip_padding():
    assert positions_of(TOKENS, PAD).tolist() == [[2, 3, 4, 5], [2, 3, 1, 1]]


def test_positions_go_on_after_earlier_steps():
    assert positions_of(TOKENS, PAD, torch.tensor([3, 0])).tolist() == [[5, 6, 7, 8], [2, 3, 1, 1]]


@pytest.mark.parametrize("width", [8, 9])
def test_sinusoids(width):
    out = SinusoidalPositionalEmbedding(4, width, PAD)(TOKENS)
    half = width // 2
    for t, position in enumerate([2, 3, 4, 5]):
        for i in range(half):
            angle = position * 10000 ** (-i / (half - 1))
            assert out[0, t, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert out[0, t, half + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert not out[1, 2:].any()
    assert not out[..., 2 * half :].any()


def test_sinusoids_reach_beyond_the_length_the_model_was_made_for():
    short, long = SinusoidalPositionalEmbedding(4, 8, PAD), SinusoidalPositionalEmbedding(64, 8, PAD)
    text = torch.full((1, 60), 7)
    short(text[:, :3])
    assert torch.equal(short(text), long(text))


def test_sinusoids_made_in_validation_serve_training():
    embed = SinusoidalPositionalEmbedding(4, 8, PAD)
    with torch.inference_mode():
        embed(TOKENS)
    weight = torch.ones(8, requires_grad=True)
    (embed(TOKENS) * weight).sum().backward()
    assert weight.grad is not None


def test_half_precision_rounds_the_exact_table():
    embed = SinusoidalPositionalEmbedding(4, 8, PAD)
    exact = embed(TOKENS)
    assert torch.equal(embed.half()(TOKENS), exact.half())


def test_learned_positions():
    embed = LearnedPositionalEmbedding(4, 8, PAD)
    assert embed.weight.shape == (4 + PAD + 1, 8)
    assert torch.equal(embed(TOKENS)[0, 1], embed.weight[3])
    assert not embed(TOKENS)[1, 2:].any()
    with pytest.raises(ValueError, match="5 tokens is longer than the 4 positions"):
        embed(torch.full((1, 5), 7))
    with pytest.raises(ValueError, match="6 tokens"):
        embed(TOKENS, torch.tensor([2, 2]), num_before=2)
