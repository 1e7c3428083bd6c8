"""Sequences that join and leave a batch between steps, against ``generate`` of each alone."""

import pytest
import tiny_models
import torch

from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.decoding.sampling import SamplingSettings, TokenSampler
from fairseq.hf.hooks.names import KeyType

LENGTHS = (5, 9, 3, 9)
SETTINGS = [SamplingSettings(0.0)] * 3 + [SamplingSettings(0.8, 0.9, seed=7)]
JOINING = sorted(set(tiny_models.DECODERS) - {"mistral", "gemma2", "gemma3_text"})


def endless(name):
    model = tiny_models.make(name)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def alone(model, ids, settings, count):
    """What ``generate`` gives."""
    sampling = {"do_sample": False}
    if not settings.is_greedy:
        torch.manual_seed(settings.seed)
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        found = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=count, **sampling)
    return found[0].tolist()


@pytest.mark.parametrize("name", JOINING)
def test_each_sequence_is_what_generate_makes_of_it_alone(name):
    """One joins before every step; then they leave, one after the other, the longest first."""
    model = endless(name)
    decoder = RowDecoder(model, [KeyType.last_ffn_input])
    prompts = [tiny_models.tokens(length, seed=length + n).tolist() for n, length in enumerate(LENGTHS)]
    wanted = [alone(model, ids, settings, 9) for ids, settings in zip(prompts, SETTINGS)]
    samplers = [TokenSampler(model, settings, len(ids)) for settings, ids in zip(SETTINGS, prompts)]
    whole = [list(ids) for ids in prompts]
    cached, running = None, []

    def step():
        scores = decoder.step(cached, [whole[n][-1] for n in running])
        assert scores.keys[KeyType.last_ffn_input].shape[:2] == (len(running), 1)
        for row, n in enumerate(running):
            whole[n].append(samplers[n].choose(scores.logits_BLV[row, -1], whole[n]))

    for n, ids in enumerate(prompts):
        own, scores = decoder.read(ids)
        assert own.can_join
        whole[n].append(samplers[n].choose(scores.logits_BLV[0, -1], ids))
        if cached is None:
            cached = own
        else:
            cached.join(own)
        running.append(n)
        step()
    for leaving in (1, 3, 0):
        step()
        cached.select([row for row, n in enumerate(running) if n != leaving])
        running.remove(leaving)
        assert cached.width == max(cached.lengths)
    step()
    decoder.close()
    assert [len(ids) - length for ids, length in zip(whole, LENGTHS)] == [8, 5, 7, 4]
    assert whole == [ids[: len(mine)] for ids, mine in zip(wanted, whole)]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_caches_of_sliding_windows_say_that_they_cannot_join(name):
    decoder = RowDecoder(endless(name), [KeyType.final_hidden])
    cached, _ = decoder.read([5, 6, 7])
    assert not cached.can_join
    decoder.close()


def test_a_prompt_read_once_can_have_several_continuations():
    model = endless("llama")
    decoder = RowDecoder(model, [KeyType.last_ffn_input])
    cached, scores = decoder.read([5, 6, 7])
    cached.repeat(3)
    first = int(scores.logits_BLV[0, -1].argmax())
    after = decoder.step(cached, [first, 9, first]).logits_BLV[:, -1]
    decoder.close()
    for row, token in enumerate((first, 9, first)):
        torch.testing.assert_close(after[row], model(torch.tensor([[5, 6, 7, token]])).logits[0, -1])


def test_all_positions_have_scores_and_keys():
    model = endless("llama")
    decoder = RowDecoder(model, [KeyType.last_ffn_input, KeyType.final_hidden])
    _, scores = decoder.read([5, 6, 7, 8], all_positions=True)
    decoder.close()
    torch.testing.assert_close(scores.logits_BLV, model(torch.tensor([[5, 6, 7, 8]])).logits)
    assert {kind: tuple(key.shape) for kind, key in scores.keys.items()} == {
        KeyType.last_ffn_input: (1, 4, 16),
        KeyType.final_hidden: (1, 4, 16),
    }
    with torch.inference_mode():
        made = model.lm_head(scores.keys[KeyType.final_hidden])
    torch.testing.assert_close(made, scores.logits_BLV)


def test_without_a_seed_draws_differ_and_with_one_they_do_not():
    model = endless("llama")
    flat = torch.zeros(tiny_models.VOCABULARY)

    def draw(seed):
        sampler = TokenSampler(model, SamplingSettings(1.0, seed=seed), 1)
        return [sampler.choose(flat, [5]) for _ in range(12)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
