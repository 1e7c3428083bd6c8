"""Every architecture with memories equals dense attention over memories and local keys; without, itself bit by bit."""

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import MODELS, ROTARY, ids, oracle, plain_memories, tiny

from fairseq.hf.attention.wrapper import extended_mind

MEMORY, PROMPT = ids(30, seed=2), ids(9, seed=3)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mpt"}))  # see test_extended_mind_reference.py
def test_logits_are_those_of_dense_attention(name):
    model = tiny(name)
    memories = plain_memories(model, MEMORY)
    with torch.no_grad(), oracle(model, memories, topk=4):
        expected = model(PROMPT).logits
    with torch.no_grad():
        plain = model(PROMPT).logits
        with extended_mind(model, MEMORY, topk=4, remove_special_ids=False) as mind:
            found = model(PROMPT).logits
            for layer, (key, value) in memories.items():
                torch.testing.assert_close(mind.memories[0].layers[layer].key_GSD, key, atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(mind.memories[0].layers[layer].value_GSD, value, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_changes_without_memories_or_afterwards(name):
    model = tiny(name)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        plain = model(PROMPT).logits
        with extended_mind(model, MEMORY, topk=0):
            assert torch.equal(model(PROMPT).logits, plain)
        with extended_mind(model, MEMORY, topk=3):
            assert torch.equal(model(PROMPT, topk=0).logits, plain)
            assert torch.equal(model(PROMPT, use_external_mind=False).logits, plain)
        with extended_mind(model):
            assert torch.equal(model(PROMPT).logits, plain)
        assert torch.equal(model(PROMPT).logits, plain)
    assert not {"forward", "generate"} & set(model.__dict__)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not model.config._attn_implementation.startswith("extended_mind")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_by_layer_and_by_similarity(name):
    model = tiny(name)
    memories = plain_memories(model, MEMORY)
    with torch.no_grad(), oracle(model, memories, topk=6, threshold=0.3, layers=[0, 2]):
        expected = model(PROMPT).logits
    with (
        torch.no_grad(),
        extended_mind(
            model, MEMORY, topk=6, mask_by_sim=True, sim_threshold=0.3, layers=[0, -1], remove_special_ids=False
        ),
    ):
        torch.testing.assert_close(model(PROMPT).logits, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_relative_positions_are_those_of_a_longer_text(name):
    """With all memories chosen, one layer and no window between, the model reads memory and prompt as one text."""
    changes = {"n_layer": 1} if name == "gptj" else {"num_hidden_layers": 1}
    if "sliding_window" in MODELS[name]:
        changes["sliding_window"] = 90
    model = tiny(name, **changes)
    with torch.no_grad():
        expected = model(torch.cat([MEMORY, PROMPT], 1)).logits[:, MEMORY.shape[1] :]
        with extended_mind(model, MEMORY, topk=30, positions="relative", remove_special_ids=False):
            found = model(PROMPT).logits
        with extended_mind(model, MEMORY, topk=30, remove_special_ids=False):
            at_origin = model(PROMPT).logits
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    assert (at_origin - expected).abs().max() > 1e-3
