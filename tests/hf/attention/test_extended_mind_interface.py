"""The seed's way to use models with memories."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import ids, tiny

from fairseq.hf.attention.original_api import default_settings, from_pretrained
from fairseq.hf.attention.wrapper import extended_mind

MEMORY, OTHER, PROMPT = ids(20, seed=2), ids(15, seed=4), ids(7, seed=3)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=["llama", "mpt"])
def saved(request, tmp_path):
    model = tiny(request.param)
    model.save_pretrained(tmp_path / "model")
    return model, str(tmp_path / "model")


def generated(model, memory, **settings):
    with extended_mind(model, memory, **default_settings(model) | settings):
        return model.generate(PROMPT, **GREEDY)


def test_memories_are_given_exchanged_and_cleared(saved):
    plain, folder = saved
    model = from_pretrained(folder, external_memories=MEMORY[0].tolist(), trust_remote_code=True)
    assert model.memory_ids == MEMORY[0].tolist()
    assert model.memories is None
    assert torch.equal(model.generate(PROMPT, **GREEDY), generated(plain, MEMORY))
    assert len(model.memories[0]) == 20
    assert torch.equal(model.generate(PROMPT, topk=2, **GREEDY), generated(plain, MEMORY, topk=2))
    assert torch.equal(model.generate(PROMPT, use_external_mind=False, **GREEDY), plain.generate(PROMPT, **GREEDY))
    model.memory_ids = OTHER
    assert torch.equal(model.generate(PROMPT, **GREEDY), generated(plain, OTHER))
    model.clear_memories()
    assert model.memory_ids is None
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)
    model.memory_ids = MEMORY
    with torch.no_grad():
        out = model(PROMPT, output_retrieved_memory_idx=True)
    assert out.attentions[1][0].shape == (1, 4, 70)
    model.generate_cache(MEMORY, stride=4, max_len=8)
    with torch.no_grad():
        assert not torch.equal(model(PROMPT).logits, out.logits)


def test_part_of_the_settings_is_enough_and_names_count_most(saved):
    plain, folder = saved
    model = from_pretrained(folder, external_memories=MEMORY, memory_config={"topk": 3, "mask_by_sim": False}, topk=6)
    expected = generated(plain, MEMORY, topk=6, mask_by_sim=False)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    with pytest.raises(ValueError, match="unknown memory setting 'top'"):
        from_pretrained(folder, memory_config={"top": 3})


def test_a_model_with_memories_saves_itself_as_what_it_is(saved, tmp_path):
    plain, folder = saved
    from_pretrained(folder, external_memories=MEMORY).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [type(plain).__name__]
    again = from_pretrained(str(tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, plain(PROMPT).logits)


def test_configs_of_the_originals_models_are_understood(saved, tmp_path):
    plain, folder = saved
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    memory = {"topk": 2, "sim_threshold": 0.3, "mask_by_sim": True, "use_external_mind_by_layer": [True] * 32}
    if config["model_type"] == "mpt":
        config["attn_config"] = dict(config["attn_config"]) | memory
        config["max_seq_len_inference"] = config.pop("max_seq_len")
    else:
        config["memory_config"] = memory
    config["model_type"] = "extended-" + config["model_type"]
    path.write_text(json.dumps(config), encoding="utf-8")
    model = from_pretrained(folder, external_memories=MEMORY)
    expected = generated(plain, MEMORY, topk=2, sim_threshold=0.3, mask_by_sim=True)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
