"""Memories in a model that other programs wrap, train, cast, copy or call below its head: used, or one clear error."""

from __future__ import annotations

import copy
import types

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import ids, oracle, plain_memories, tiny
from stand_ins import Around, fuse_head

from fairseq.hf.attention.wrapper import ExtendedMind, extended_mind

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("wrap", [Around, with_lora])
@torch.no_grad()
def test_a_wrapped_model_retrieves_what_the_model_inside_does(wrap):
    model, prompt, memory = tiny("llama"), ids(5, seed=3), ids(20, seed=2)[0].tolist()
    more = {"output_retrieved_memory_idx": True, "return_dict_in_generate": True, **GREEDY}
    with extended_mind(model, memory, topk=3) as mind:
        expected = model.generate(input_ids=prompt, **more)
        logits = model(input_ids=prompt).logits
        cited = mind.citations(top=1)
    outer = wrap(model)
    with extended_mind(outer, memory, topk=3) as mind:
        found = outer.generate(input_ids=prompt, **more)
        one_call = outer(input_ids=prompt, output_retrieved_memory_idx=True)
        assert mind.retrieved
        outer.generate(input_ids=prompt, **more)
        assert mind.citations(top=1)[0].start == cited[0].start
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.retrieved_memory_idx) == len(expected.retrieved_memory_idx) == 4
    for step, want in zip(found.retrieved_memory_idx, expected.retrieved_memory_idx):
        assert all(torch.equal(one, other) for one, other in zip(step, want))
    torch.testing.assert_close(one_call.logits, logits)
    assert torch.equal(one_call.retrieved_memory_idx[0], expected.retrieved_memory_idx[0][0])
    assert not outer(input_ids=prompt).get("retrieved_memory_idx")


MEMORY = ids(20, seed=2)[0].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_autocast_gives_what_dense_attention_gives_up_to_rounding(name):
    model, prompt = tiny(name), ids(7, seed=3)
    with extended_mind(model, MEMORY, topk=20, remove_special_ids=False), torch.autocast("cpu", torch.bfloat16):
        found = model(prompt).logits.float()  # with all memories, so that no rounding changes the choice
    with oracle(model, plain_memories(model, ids(20, seed=2)), topk=20):
        wanted = model(prompt).logits
    plain = model(prompt).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounding = float((model(prompt).logits.float() - plain).abs().max())  # what it does to the model alone
    assert float((found - wanted).abs().max()) < 3 * rounding
    assert float((plain - wanted).abs().max()) > 10 * rounding


@pytest.mark.parametrize("positions", ["origin", "relative"])
@torch.no_grad()
def test_layers_that_are_called_without_the_head_use_the_memories(positions):
    model, prompt = tiny("llama"), ids(7, seed=3)
    with extended_mind(model, MEMORY, topk=3, positions=positions):
        expected = model(prompt).logits
        torch.testing.assert_close(model.lm_head(model.model(prompt).last_hidden_state), expected)
        fuse_head(model)
        loss = model(prompt, labels=prompt, fused_lm_head=True)["loss"]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected[0, :-1], prompt[0, 1:]))


@torch.no_grad()
def test_a_memory_that_waits_is_built_before_layers_that_are_called_without_the_head():
    model, prompt = tiny("llama"), ids(7, seed=3)
    with extended_mind(model, MEMORY, topk=3):
        expected = model.model(prompt).last_hidden_state
    with extended_mind(model, topk=3) as mind:
        mind.set_memory_later(MEMORY)
        torch.testing.assert_close(model.model(prompt).last_hidden_state, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, prompt = tiny("llama").train(), ids(7, seed=3)
    found = []
    with extended_mind(model, MEMORY, topk=3):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            model(prompt, labels=prompt).loss.backward()
            found.append([weight.grad.clone() for weight in model.parameters()])
        with pytest.raises(ValueError, match="topk for one call and gradient checkpointing exclude each other"):
            model(prompt, topk=2)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_another_attention_function_while_memories_are_attached_is_rejected():
    model, prompt = tiny("llama"), ids(7, seed=3)
    plain = model(prompt).logits
    with extended_mind(model, MEMORY, topk=3):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="was set to 'eager' while memories are attached"):
            model(prompt)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(prompt).logits, plain)


@torch.no_grad()
def test_a_copy_of_a_model_with_memories_is_rejected():
    model, prompt = tiny("llama"), ids(7, seed=3)
    plain = model(prompt).logits
    with extended_mind(model, MEMORY, topk=3), pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(model)
    assert torch.equal(copy.deepcopy(model)(prompt).logits, plain)


def test_continuous_batching_is_rejected_while_memories_are_attached():
    model = tiny("llama")
    own = model.generate_batch
    with extended_mind(model, MEMORY), pytest.raises(ValueError, match=r"continuous batching \(generate_batch\)"):
        model.generate_batch([[3, 4]])
    assert model.generate_batch == own


def test_a_model_whose_weights_are_elsewhere_is_rejected():
    model = tiny("llama")
    mind = ExtendedMind(model, MEMORY)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
    for call in (lambda: ExtendedMind(model, MEMORY), lambda: mind.add_memory(MEMORY)):
        with pytest.raises(ValueError, match="1 parameters of this LlamaForCausalLM are offloaded"):
            call()


@torch.no_grad()
def test_a_forward_that_is_bound_to_the_model_again_uses_the_memories():
    model, prompt = tiny("llama"), ids(7, seed=3)
    with extended_mind(model, MEMORY, topk=3):
        expected = model(prompt).logits
        model.forward = types.MethodType(model.forward, model)  # as accelerate's unwrap_model does
        assert torch.equal(model(prompt, topk=3).logits, expected)
