"""Adaptive input: every token is embedded by its band."""

import pytest
import torch

from fairseq.modules.adaptive_input import AdaptiveInput


def make(cutoff=(5, 12), size=20):
    torch.manual_seed(0)
    made = AdaptiveInput(size, 1, 8, 2, 6, cutoff)
    made.reset_parameters()
    return made


def test_each_token_is_embedded_by_its_band():
    embed = make()
    tokens = torch.arange(20).flip(0).reshape(4, 5)
    out = embed(tokens)
    for row, token in zip(out.reshape(20, 6), tokens.flatten().tolist()):
        band, low = (0, 0) if token < 5 else (1, 5) if token < 12 else (2, 12)
        table, projection = embed.embeddings[band]
        assert table.weight.shape[1] == 8 // 2**band
        torch.testing.assert_close(row, projection.weight @ table.weight[token - low])


def test_names_and_shapes_are_fairseqs():
    assert {name: tuple(value.shape) for name, value in make().state_dict().items()} == {
        "_float_tensor": (1,),
        "embeddings.0.0.weight": (5, 8),
        "embeddings.0.1.weight": (6, 8),
        "embeddings.1.0.weight": (7, 4),
        "embeddings.1.1.weight": (6, 4),
        "embeddings.2.0.weight": (8, 2),
        "embeddings.2.1.weight": (6, 2),
    }


def test_padding_is_zero_and_stays_so():
    embed = make()
    embed(torch.tensor([[1, 2, 13]])).sum().backward()
    assert not embed.embeddings[0][0].weight[1].any()
    assert not embed.embeddings[0][0].weight.grad[1].any()
    assert embed.embeddings[2][0].weight.grad[1].any()


def test_bands_without_tokens_get_a_zero_gradient():
    embed = make()
    embed(torch.tensor([[2, 3]])).sum().backward()
    assert all(p.grad is not None for p in embed.parameters())
    assert embed(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 6)


def test_last_cutoff_may_be_the_dictionary():
    assert make(cutoff=(5, 20)).ends == [5, 20]
    with pytest.raises(ValueError, match="5,21 reaches beyond the dictionary of 20 types"):
        make(cutoff=(5, 21))
    with pytest.raises(ValueError, match="band 1 of width 8 has no dimension left"):
        AdaptiveInput(20, 1, 8, 9, 6, (5,))
