"""RetoMaton's state belongs to a sequence and a position: the oracle reads one sequence at a time, in lists."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import VOCABULARY, cache_in, inputs, make, resuming, tokens, transformers

from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver

pytestmark = pytest.mark.usefixtures("no_grad")
K, WEIGHT = 5, 0.6
SETTINGS = {"k": K, "lmbda": WEIGHT, "min_knns": 1}


def a_text():
    """Much of it comes twice, so that pointers are followed."""
    text = tokens(240, seed=3)
    for place in range(40, 240):
        if place % 7:
            text[place] = text[place - 37]
    return text


@pytest.fixture(scope="module")
def model():
    return make("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    with torch.no_grad(), KNNSaver(dstore_dir=path, dtype="float32")(model) as saver:
        text = a_text()[None]
        model(input_ids=text, labels=text)
        with saver.paused(), capture_key(saver.tap) as capture:
            model(input_ids=text)
            model.store = capture.take(1)[0, :-1].double(), text[0, 1:].tolist()
    return path


class Reader:
    """The automaton for one sequence: candidates of a position, and what follows from them."""

    def __init__(self, store):
        self.keys, self.values = store
        self.candidates: list[int] = []

    def logp(self, logits, key, token):
        """Of the next position; ``token`` came after the last one, None if the sequence begins anew."""
        score = -(self.keys - key.double()).square().sum(1)
        rows = [] if token is None else [row + 1 for row in self.candidates if self.values[row] == int(token)]
        rows = list(dict.fromkeys(row for row in rows if row < len(self.values)))
        if not rows:
            rows = score.topk(K).indices.tolist()
        self.candidates = sorted(rows, key=lambda row: -float(score[row]))
        knn = torch.zeros(VOCABULARY, dtype=torch.float64)
        for share, row in zip(score[rows].softmax(0), rows):
            knn[self.values[row]] += share
        return ((1 - WEIGHT) * logits.double().softmax(-1) + WEIGHT * knn).log().float()


def read(model, ids, begins=(0,)):
    """Log-probabilities of all positions of a sequence; the state begins anew at some of them."""
    held = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: held.append(given[0]))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    handle.remove()
    reader = Reader(model.store)
    return torch.stack(
        [
            reader.logp(logits[t], held[0].view(len(ids), -1)[t], None if t in begins else ids[t])
            for t in range(len(ids))
        ]
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture
def attached(model, folder):
    with RetomatonWrapper(dstore_dir=folder, **SETTINGS)(model) as reto:
        yield reto


def expected_of(model, attached, ids, begins=(0,)):
    with attached.paused():
        return read(model, ids, begins)


def test_a_second_turn_of_which_only_the_last_position_is_scored_begins_anew(model, attached):
    for start in (40, 90, 140):
        ids = a_text()[start : start + 12]
        cache = cache_in(model(ids[None, :6], use_cache=True))
        out = model(ids[None, 6:], **resuming(model, cache), logits_to_keep=1)
        close(out.logits[0, -1], expected_of(model, attached, ids, begins=(11,))[-1])
        after = model(a_text()[None, start + 12 : start + 13], **resuming(model, cache_in(out))).logits[0, -1]
        whole = expected_of(model, attached, a_text()[start : start + 13], begins=(11,))
        close(after, whole[-1])


def test_scores_of_some_positions_follow_no_gap(model, attached):
    ids = a_text()[60:75]
    kept = torch.tensor([1, 2, 3, 7, 8, 14])
    found = model(ids[None], logits_to_keep=kept).logits[0]
    close(found, expected_of(model, attached, ids, begins=(1, 7, 14))[kept])


def test_labels_that_do_not_count_are_a_gap(model, attached):
    ids = a_text()[60:75]
    labels = ids.clone()
    labels[5:8] = -100  # positions 4 to 6 are not looked up
    out = model(ids[None], labels=labels[None]).logits[0]
    looked_up = [place for place in range(14) if not 4 <= place <= 6]
    close(out[looked_up], expected_of(model, attached, ids, begins=(0, 7))[looked_up])


@pytest.mark.parametrize("labelled", [False, True])
def test_a_packed_row_is_several_sequences(model, attached, labelled):
    ids = a_text()[60:80]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    labels = {"labels": ids[None]} if labelled else {}
    found = model(ids[None], position_ids=positions, use_cache=False, **labels).logits[0]
    expected = torch.cat([expected_of(model, attached, ids[:8]), expected_of(model, attached, ids[8:])])
    close(found[:19] if labelled else found, expected[:19] if labelled else expected)


@pytest.mark.parametrize("assisted", ["prompt lookup", "draft model", "early exit"])
def test_assisted_decoding_gives_the_text_of_greedy_search(model, attached, assisted):
    more = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "draft model": {"assistant_model": make("llama", seed=9, max_position_embeddings=256)},
        "early exit": {"assistant_early_exit": 1},
    }[assisted]
    for start in (20, 71, 133):
        prompt = a_text()[None, start : start + 10]
        greedy = model.generate(prompt, max_new_tokens=15, eos_token_id=None)
        assert torch.equal(model.generate(prompt, max_new_tokens=15, eos_token_id=None, **more), greedy)


def test_a_cache_that_is_cropped_copied_or_selected_takes_its_steps_along(model, attached):
    text = a_text()
    ids = torch.stack([text[60:75], text[100:115]])
    cache = cache_in(model(ids[:, :8], use_cache=True))
    for place in range(8, 12):
        cache = cache_in(model(ids[:, place : place + 1], **resuming(model, cache)))
    twin = copy.deepcopy(cache)
    cache.crop(-3)  # 9 tokens are left
    searched = attached.num_searched
    found = model(ids[:, 9:15], **resuming(model, cache)).logits
    for row in range(2):
        close(found[row], expected_of(model, attached, ids[row])[9:])
    assert attached.num_searched - searched < 12
    twin.batch_select_indices(torch.tensor([1]))
    twin.batch_repeat_interleave(2)
    twin.reorder_cache(torch.tensor([1, 0]))
    found = model(ids[[1, 1], 12:15], **resuming(model, twin)).logits
    for row in range(2):
        close(found[row], expected_of(model, attached, ids[1])[12:])
    kind, state = twin.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[1]
    assert kind is transformers.DynamicCache
    assert "_retomaton_steps" not in state
    assert b"retomaton_steps" not in pickle.dumps(twin)
    twin.reset()
    close(model(ids[:, :3], **resuming(model, twin)).logits[0], expected_of(model, attached, ids[0, :3]))


def test_padding_on_the_right_and_left_continues_from_the_last_token(model, attached):
    text, lengths = a_text(), (6, 9)
    ids = torch.stack([torch.nn.functional.pad(text[60 : 60 + n], (9 - n, 0)) for n in lengths])
    mask = torch.stack([(torch.arange(9) >= 9 - n).long() for n in lengths])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, output_scores=True, return_dict_in_generate=True, eos_token_id=None
    )
    for row, length in enumerate(lengths):
        sequence = out.sequences[row, 9 - length :]
        expected = expected_of(model, attached, sequence, begins=(length - 1,))
        close(torch.stack([score[row] for score in out.scores]), expected[length - 1 : -1])


def test_embeddings_without_tokens_begin_anew_at_every_position(model, attached):
    ids = a_text()[60:70]
    found = model(inputs_embeds=model.get_input_embeddings()(ids)[None]).logits[0]
    close(found, expected_of(model, attached, ids, begins=range(10)))


def test_continuous_batching_is_rejected_with_what_to_use(model, attached):
    with pytest.raises(ValueError, match=r"continuous batching \(generate_batch\).* use model.generate, or KNNWrapper"):
        model.generate_batch([[3, 4]])


def test_break_out_restores_the_class_of_the_caches(model, folder):
    with RetomatonWrapper(dstore_dir=folder, **SETTINGS)(model):
        cache = cache_in(model(a_text()[None, :5], use_cache=True))
        assert isinstance(cache, transformers.DynamicCache)
    assert type(cache) is transformers.DynamicCache
    assert "_retomaton_steps" not in vars(cache)
    assert "generate_batch" not in vars(model)


def test_a_state_space_model_generates_token_by_token_as_it_reads(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3, pad_token_id=0
    )
    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(config).eval()
    saver = {"dstore_dir": tmp_path, "knn_keytype": "final_hidden"}
    with KNNSaver(**saver)(mamba):
        mamba(**inputs(mamba, batch=4, length=30))
    ids = inputs(mamba, batch=4, length=30)["input_ids"][:2, 3:13]
    with RetomatonWrapper(**saver, **SETTINGS)(mamba) as reto:
        whole = mamba(ids, use_cache=False).logits
        once = reto.num_searched
        out = mamba(ids[:, :4], use_cache=True)
        found = [out.logits]
        for place in range(4, 10):
            out = mamba(ids[:, place : place + 1], **resuming(mamba, cache_in(out)))
            found.append(out.logits)
        assert reto.num_searched == 2 * once < 40
        close(torch.cat(found, 1), whole)
        assert mamba.generate(ids, max_new_tokens=4, eos_token_id=None).shape == (2, 14)
