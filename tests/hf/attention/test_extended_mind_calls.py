"""Batches, padding, beams, caches, types, generation, what was retrieved, and memories that come and go."""

import gc
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import ids, tiny
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from fairseq.hf.attention.build import build_memory
from fairseq.hf.attention.wrapper import ExtendedMind, extended_mind
from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.extended_mind.storage import load_memory, save_memory

MEMORY, PROMPT = ids(30, seed=2), ids(7, seed=3)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def memories_of(model, count, **settings):
    settings = MindSettings(remove_special_ids=False, **settings)
    return [build_memory(model, ids(10 + 7 * i, seed=10 + i), settings=settings) for i in range(count)]


def padded(prompts, side):
    longest = max(p.shape[1] for p in prompts)
    rows, masks = [], []
    for prompt in prompts:
        pad = torch.zeros(longest - prompt.shape[1], dtype=torch.int64)
        one = torch.ones_like(prompt[0])
        parts = ((pad, prompt[0]), (pad, one)) if side == "left" else ((prompt[0], pad), (one, pad))
        rows.append(torch.cat(parts[0]))
        masks.append(torch.cat(parts[1]))
    return torch.stack(rows), torch.stack(masks)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "gpt2", "gemma2", "mpt"])
def test_a_batch_with_memories_of_its_own_equals_single_runs(name):
    model = tiny(name)
    memories = memories_of(model, 4)
    prompts = [ids(n, seed=20 + n) for n in (7, 3, 5, 6)]
    batch, mask = padded(prompts, "left")
    with extended_mind(model, memories, topk=12, remove_special_ids=False):
        together = model.generate(batch, attention_mask=mask, pad_token_id=0, **GREEDY)[:, batch.shape[1] :]
    for prompt, memory, row in zip(prompts, memories, together):
        with extended_mind(model, memory, topk=12, remove_special_ids=False):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **GREEDY)
        assert torch.equal(alone[0, prompt.shape[1] :], row)
    plain = model.generate(batch, attention_mask=mask, pad_token_id=0, **GREEDY)[:, batch.shape[1] :]
    assert not torch.equal(plain, together)


def test_right_padding_changes_no_logits(llama):
    prompts = [ids(7, seed=3), ids(4, seed=5)]
    batch, mask = padded(prompts, "right")
    with torch.no_grad(), extended_mind(llama, MEMORY, topk=3):
        together = llama(batch, attention_mask=mask).logits
        for prompt, row in zip(prompts, together):
            torch.testing.assert_close(llama(prompt).logits[0], row[: prompt.shape[1]], atol=1e-5, rtol=1e-5)


def test_beams_share_the_memory_of_their_row(llama):
    memories = memories_of(llama, 2)
    prompts = torch.cat([ids(5, seed=30), ids(5, seed=31)])
    beams = {"num_beams": 4, "num_return_sequences": 2} | GREEDY
    with extended_mind(llama, memories, topk=4, remove_special_ids=False):
        together = llama.generate(prompts, pad_token_id=0, **beams)
    for row in range(2):
        with extended_mind(llama, memories[row], topk=4, remove_special_ids=False):
            alone = llama.generate(prompts[row : row + 1], pad_token_id=0, **beams)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_caches_do_not_matter(name):
    model = tiny(name)
    with extended_mind(model, MEMORY, topk=5):
        runs = [
            model.generate(PROMPT, pad_token_id=0, **GREEDY, **more)
            for more in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
        ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full(dtype):
    full, half = tiny("llama"), tiny("llama").to(dtype)
    with torch.no_grad():
        with extended_mind(full, MEMORY, topk=30):
            expected = full(PROMPT).logits
        with extended_mind(half, MEMORY, topk=30) as mind:
            found = half(PROMPT).logits
    assert found.dtype is dtype
    assert mind.memories[0].layers[0].key_GSD.dtype is dtype
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("memory_type", ["exact", "faiss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_memory_type_finds_the_same(llama, memory_type, dtype):
    model = tiny("llama").to(dtype)
    with torch.no_grad():
        found = []
        for kind in ("manual", memory_type):
            with extended_mind(model, MEMORY, topk=4, memory_type=kind, sim_threshold=0.1, mask_by_sim=True):
                found.append(model(PROMPT).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5 if dtype is torch.float32 else 0.05, rtol=1e-3)


def test_windows_keep_what_is_new_in_each(llama):
    """Token n is kept as the last window that brings it new sees it: all of the first, then the last of the others."""
    settings = MindSettings(stride=4, max_len=12, remove_special_ids=False)
    memory = build_memory(llama, MEMORY, settings=settings, batch_size=3)
    for start, stop, new in ((0, 12, 12), (4, 16, 4), (16, 28, 4), (20, 30, 2)):
        window = build_memory(llama, MEMORY[:, start:stop], settings=MindSettings(remove_special_ids=False))
        for layer in range(3):
            for name in ("key_GSD", "value_GSD"):
                expected = getattr(window.layers[layer], name)[:, -new:]
                found = getattr(memory.layers[layer], name)[:, stop - new : stop]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(memory) == 30


def test_a_memory_longer_than_the_context_is_read_in_windows():
    model = tiny("gpt2")
    memory = build_memory(model, ids(250, seed=9))
    assert len(memory) == 250
    with torch.no_grad(), extended_mind(model, memory):
        assert torch.isfinite(model(PROMPT).logits).all()


def test_documents_do_not_see_each_other_and_are_cited(llama):
    documents = [ids(8, seed=40)[0].tolist(), ids(11, seed=41)[0].tolist()]
    memory = build_memory(llama, documents, settings=MindSettings(remove_special_ids=False))
    alone = build_memory(llama, documents[1], settings=MindSettings(remove_special_ids=False))
    torch.testing.assert_close(memory.layers[2].key_GSD[:, 8:], alone.layers[2].key_GSD, atol=1e-5, rtol=1e-5)
    assert [memory.where(token) for token in (0, 7, 8, 18)] == [(0, 0), (0, 7), (1, 0), (1, 10)]
    with extended_mind(llama, memory, topk=19, remove_special_ids=False) as mind, torch.no_grad():
        out = llama(PROMPT, output_retrieved_memory_idx=True)
        cited, parts = mind.citations(span=19), mind.citations(top=99, span=2)
    weights = mind.retrieved[0][2].weights()
    assert torch.equal(out.retrieved_memory_idx[2].sort(-1).values, torch.arange(19).expand(1, 4, 7, 19))
    # With every memory chosen, memories and local keys share what attention there is.
    assert ((weights.sum(-1) > 0) & (weights.sum(-1) < 1)).all()
    assert {(c.document, c.start, c.stop) for c in cited} == {(0, 0, 8), (1, 0, 11)}
    assert sum(c.weight for c in cited) == pytest.approx(1.0)
    assert [c.weight for c in parts] == sorted((c.weight for c in parts), reverse=True)
    assert sum(c.weight for c in parts) == pytest.approx(1.0)
    assert all(c.stop - c.start == 2 for c in parts)


def test_retrieved_numbers_are_the_users_tokens(llama):
    tokens = MEMORY.clone()
    tokens[0, [0, 5]] = torch.tensor([1, 2])
    call = {"output_retrieved_memory_idx": True, "return_dict_in_generate": True, "output_attentions": True}
    with extended_mind(llama, tokens, topk=3) as mind:
        out = llama.generate(PROMPT, pad_token_id=0, **GREEDY, **call)
        assert len(mind.memories[0]) == 28
    assert len(out.retrieved_memory_idx) == 6
    assert [step[1].shape for step in out.retrieved_memory_idx[:2]] == [(1, 4, 7, 3), (1, 4, 1, 3)]
    own, flat = out.attentions[0]
    assert own is None
    assert torch.equal(flat[1], out.retrieved_memory_idx[0][1].flatten(2))
    seen = torch.cat([x.flatten() for step in out.retrieved_memory_idx for x in step])
    assert not {0, 5} & set(seen.tolist())
    assert 29 in seen


def test_rows_with_fewer_memories_are_filled_up(llama):
    memories = memories_of(llama, 2)  # of 10 and 17
    with torch.no_grad(), extended_mind(llama, memories, topk=15, remove_special_ids=False):
        out = llama(torch.cat([PROMPT, PROMPT]), output_retrieved_memory_idx=True)
    assert (out.retrieved_memory_idx[0][0, ..., 10:] == -1).all()
    assert (out.retrieved_memory_idx[0][1] >= 0).all()


@pytest.mark.parametrize("memory_type", ["manual", "exact"])
@pytest.mark.parametrize("device", ["cpu", "disk", "model"])
def test_memories_are_kept_anywhere_and_in_files(llama, tmp_path, device, memory_type):
    path = tmp_path / "memory.safetensors"
    settings = {"topk": 4, "memory_type": memory_type}
    with torch.no_grad(), extended_mind(llama, MEMORY, **settings) as mind:
        expected = llama(PROMPT).logits
        mind.save_memory(path)
    with torch.no_grad(), extended_mind(llama, memory_device=device, **settings) as mind:
        mind.load_memory(path)
        assert torch.equal(llama(PROMPT).logits, expected)
        mind.set_memory(MEMORY)
        assert torch.equal(llama(PROMPT).logits, expected)
    assert [p for p in path.parent.iterdir() if p.name.endswith((".tmp", ".lock"))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("frozen_heap")
def test_a_memory_on_disk_is_written_while_it_is_made(tmp_path, dtype):
    """Keys and values of 8 or 16 kB a token: 8 or 16 MB that must not be in memory together, at no time."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(dtype)
    source, settings = ids(1000, seed=4), MindSettings(max_len=256, stride=64)
    held: list[int] = []
    hook = model.register_forward_hook(lambda *_: held.append(bytes_of_new_tensors()))
    expected = build_memory(model, source, settings=settings, batch_size=1)
    assert max(held) - min(held) > expected.nbytes / 2  # one in memory grows with every window
    held.clear()
    made = build_memory(model, source, settings=settings, folder=str(tmp_path), batch_size=1)
    hook.remove()
    assert max(held) - min(held) < expected.nbytes / 5
    assert torch.equal(made.place_S, expected.place_S)
    for number, layer in expected.layers.items():
        for kind, mine, there in (
            ("keys", made.layers[number].key_GSD, layer.key_GSD),
            ("values", made.layers[number].value_GSD, layer.value_GSD),
        ):
            torch.testing.assert_close(mine, there, atol=0.05 if dtype is torch.bfloat16 else 1e-5, rtol=0)
            stored = torch.from_file(str(tmp_path / f"{number}.{kind}"), size=mine.numel(), dtype=dtype)
            assert torch.equal(stored.view(mine.shape), mine)


def bytes_of_new_tensors():
    """Bytes of all tensors since ``frozen_heap`` that no file stands behind: the same in every run, unlike the heap."""
    # No subclass: what torch.compile keeps of an earlier test are tensors without bytes.
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for s in storages.values() if s.filename is None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_disk_that_is_full_is_told(llama, tmp_path):
    (tmp_path / "0.keys").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*0.keys"):
        build_memory(llama, MEMORY, folder=str(tmp_path))


@pytest.mark.parametrize("positions", ["origin", "relative"])
def test_memories_are_added_and_cleared(llama, positions):
    first, second = ids(12, seed=50), ids(9, seed=51)
    both = [first[0].tolist(), second[0].tolist()]
    settings = {"topk": 6, "positions": positions}
    with torch.no_grad():
        plain = llama(PROMPT).logits
        with extended_mind(llama, both, **settings):
            expected = llama(PROMPT).logits
        with extended_mind(llama, first, **settings) as mind:
            mind.add_memory(second)
            torch.testing.assert_close(llama(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)
            mind.clear_memories()
            assert torch.equal(llama(PROMPT).logits, plain)
            mind.add_memory(both)
            torch.testing.assert_close(llama(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_model(llama):
    with extended_mind(llama, MEMORY, topk=3):
        llama(PROMPT, labels=PROMPT).loss.backward()
    gradients = [p.grad for p in llama.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    llama.zero_grad()


class Meddler(LogitsProcessor):
    def __init__(self, change):
        self.change = change

    def __call__(self, input_ids, scores):
        self.change()
        return scores


@pytest.mark.parametrize("change", ["clear_memories", "set_memory", "add_memory"])
def test_a_memory_cannot_change_while_it_is_used(llama, change):
    with extended_mind(llama, MEMORY) as mind:
        arguments = () if change == "clear_memories" else (PROMPT,)
        meddler = LogitsProcessorList([Meddler(lambda: getattr(mind, change)(*arguments))])
        with pytest.raises(ValueError, match="while the model generates"):
            llama.generate(PROMPT, logits_processor=meddler, pad_token_id=0, **GREEDY)
        mind.clear_memories()
    assert "generate" not in llama.__dict__


BAD = [
    ({"topk": -1}, "topk is -1"),
    ({"topk": 2.5}, "topk is 2.5"),
    ({"memory_type": "annoy"}, "unknown memory_type 'annoy'; known: manual, exact, faiss"),
    ({"positions": "nowhere"}, "unknown positions"),
    ({"layers": [0, 3]}, "layers holds 3; the model has 3 layers"),
    ({"use_external_mind_by_layer": [True] * 32}, "has 32 entries; the model has 3 layers"),
    ({"tokenizer_all_special_ids": [1, 61]}, "special id 61 is outside the vocabulary, which is 0 to 60"),
    ({"limit": 29}, "a memory of 30 tokens is longer than the limit of 29"),
    ({"sim_threshold": 7}, "no cosine similarity"),
    ({"top_k": 3}, "unknown memory setting 'top_k'; known: faiss_index"),
    ({"stride": 0}, "give 1 <= stride"),
    ({"faiss_probe": 0}, "faiss_probe"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_do_not_fit_are_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message), extended_mind(llama, MEMORY, **settings):
        pass
    assert "forward" not in llama.__dict__
    assert llama.config._attn_implementation == "sdpa"


def test_a_model_without_the_interface_is_refused():
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"BloomForCausalLM \(bloom\) does not call transformers' attention interface"):
        ExtendedMind(bloom, MEMORY)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        ExtendedMind(t5, MEMORY)


def test_other_mistakes_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="memory is of model"):
        ExtendedMind(tiny("llama", seed=1), build_memory(llama, MEMORY))
    with pytest.raises(ValueError, match="tokens from 3 to 61; the vocabulary is 0 to 60"):
        ExtendedMind(llama, [3, 61])
    with pytest.raises(ValueError, match="no tokens remembers nothing"):
        ExtendedMind(llama, torch.empty(1, 0))
    with pytest.raises(ValueError, match="all 2 tokens of the memory are special"):
        ExtendedMind(llama, [1, 2])
    with pytest.raises(ValueError, match="needs a tokenizer; give tokenizer="):
        ExtendedMind(llama, "a text")
    with pytest.raises(ValueError, match="adds positions to its inputs"):
        ExtendedMind(tiny("gpt2"), MEMORY, positions="relative")
    with pytest.raises(ValueError, match="positions 'origin', the settings have 'relative'; build it again"):
        ExtendedMind(llama, build_memory(llama, MEMORY), positions="relative")
    with extended_mind(llama, MEMORY), pytest.raises(ValueError, match="has memories attached already"):
        ExtendedMind(llama, MEMORY)
    with extended_mind(llama, memories_of(llama, 2), remove_special_ids=False):
        with pytest.raises(ValueError, match="a batch of 3 rows and 2 memories"):
            llama(PROMPT.expand(3, -1))
        with pytest.raises(ValueError, match="a batch of 4 rows and 2 memories"):
            llama(PROMPT.expand(4, -1))
    (tmp_path / "other.safetensors").write_bytes(b"x" * 40)
    for name in ("other.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=name):
            load_memory(tmp_path / name)


def test_a_cut_file_is_refused(llama, tmp_path):
    path = tmp_path / "memory.safetensors"
    save_memory(build_memory(llama, MEMORY), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="it is truncated; copy it again"):
        load_memory(path)


def test_the_newest_of_a_long_memory_is_kept_when_asked_for(llama, caplog):
    settings = MindSettings(limit=13, remove_special_ids=False)
    documents = [ids(8, seed=1)[0].tolist(), ids(9, seed=2)[0].tolist(), ids(6, seed=3)[0].tolist()]
    memory = build_memory(llama, documents, settings=settings, keep="newest")
    assert memory.token_N.tolist() == sum(documents, [])[-13:]
    assert memory.document_starts == (0, 7)
    assert "the oldest 10 are dropped" in caplog.text


def test_the_same_weights_in_another_type_are_the_same_model(llama):
    memory = build_memory(tiny("llama").to(torch.bfloat16), MEMORY)
    rounded = tiny("llama").to(torch.bfloat16).float()
    with torch.no_grad(), extended_mind(rounded, memory):
        assert torch.isfinite(rounded(PROMPT).logits).all()
    assert build_memory(llama, MEMORY).model_digest == memory.model_digest


def test_dropout_in_attention_is_refused():
    model = tiny("gpt2").train()
    with extended_mind(model, MEMORY), pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model(PROMPT)
