"""Memories in a model that another class wraps: they, and what was retrieved, are those of the model inside."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import ids, tiny
from stand_ins import Around

from fairseq.hf.attention.wrapper import extended_mind

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
