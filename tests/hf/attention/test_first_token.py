"""A memory of text is read after the model's first token, which is neither stored nor numbered."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from mind_models import ids, tiny

from fairseq.hf.attention.build import build_memory, first_token
from fairseq.hf.attention.wrapper import ExtendedMind
from fairseq.memory.extended_mind.settings import MindSettings

TEXT, SECOND = ids(9, seed=2)[0].tolist(), ids(6, seed=4)[0].tolist()
BOS = 1


class Tokenizer:
    """Token ids as words; ``adds`` is put before every text."""

    all_special_ids = (0, BOS, 2)
    bos_token_id: int | None = BOS
    eos_token_id: int | None = 2

    def __init__(self, adds: tuple[int, ...] = ()) -> None:
        self.adds = adds

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*self.adds, *map(int, text.split())]}

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(61)}


def words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def built(model, source, positions="origin", **more):
    settings = MindSettings(positions=positions, tokenizer_all_special_ids=(0, BOS, 2), max_len=8, stride=4)
    return build_memory(model, source, tokenizer=Tokenizer(), settings=settings, **more)


def same(one, other):
    """Equal up to rounding: windows of another length are computed in another order."""
    return all(
        torch.allclose(one.layers[layer].key_GSD, other.layers[layer].key_GSD, atol=1e-4)
        and torch.allclose(one.layers[layer].value_GSD, other.layers[layer].value_GSD, atol=1e-4)
        for layer in one.layers
    )


def test_a_text_is_read_after_the_first_token_and_numbered_without_it():
    model = tiny("llama")
    memory, by_hand = built(model, words(TEXT)), built(model, [BOS, *TEXT])
    assert memory.token_N.tolist() == TEXT
    assert memory.place_S.tolist() == list(range(9))
    assert by_hand.place_S.tolist() == list(range(1, 10))
    assert same(memory, by_hand)
    assert not same(memory, built(model, TEXT))  # token ids are read as they are
    assert same(built(model, words(TEXT), add_first_token=False), built(model, TEXT))


def test_a_tokenizer_that_adds_one_itself_gets_no_second_one():
    model = tiny("llama")
    settings = MindSettings(max_len=8, stride=4)
    memory = build_memory(model, words(TEXT), tokenizer=Tokenizer(adds=(BOS,)), settings=settings)
    assert memory.token_N.tolist() == [BOS, *TEXT]
    assert same(memory, built(model, words(TEXT)))


@pytest.mark.parametrize("positions", ["origin", "relative"])
def test_each_document_begins_with_it_also_when_one_is_appended(positions):
    model = tiny("llama")
    mind = ExtendedMind(
        model, words(TEXT), tokenizer=Tokenizer(), positions=positions, tokenizer_all_special_ids=[0, BOS, 2]
    )
    mind.add_memory([words(SECOND), SECOND])
    appended = mind.memories[0]
    whole = [words(TEXT), words(SECOND), SECOND]
    together = build_memory(model, whole, tokenizer=Tokenizer(), settings=mind.settings)
    assert appended.token_N.tolist() == together.token_N.tolist() == TEXT + SECOND + SECOND
    assert appended.document_starts == together.document_starts == (0, 9, 15)
    assert same(appended, together)


def test_citations_and_retrieved_numbers_are_of_the_users_tokens():
    model = tiny("llama")
    for add_first_token in (True, False):
        mind = ExtendedMind(model, words(TEXT), tokenizer=Tokenizer(), topk=9, add_first_token=add_first_token)
        with mind, torch.no_grad():
            out = model(ids(4), output_retrieved_memory_idx=True)
            cited = mind.citations(top=1, span=9)[0]
        assert sorted(out.retrieved_memory_idx[0][0, 0, 0].tolist()) == list(range(9))
        assert (cited.start, cited.stop, cited.text) == (0, 9, words(TEXT))


def test_the_first_token_is_bos_or_the_separator_of_documents():
    model, tokenizer = tiny("llama"), Tokenizer()
    assert first_token(model, tokenizer) == BOS
    tokenizer.bos_token_id = None
    model.config.bos_token_id = 7
    assert first_token(model, tokenizer) == 7
    model.config.bos_token_id = None
    assert first_token(model, tokenizer) == 2
    tokenizer.eos_token_id, model.config.eos_token_id = None, [5, 6]
    assert first_token(model, tokenizer) == 5
    model.config.eos_token_id = None
    assert first_token(model, tokenizer) is None
    assert built(model, words(TEXT)).token_N.tolist() == TEXT


def test_the_newest_part_of_a_long_text_begins_with_it_too():
    model = tiny("llama")
    settings = MindSettings(limit=8, tokenizer_all_special_ids=(0, BOS, 2))
    memory = build_memory(model, [words(TEXT), words(SECOND)], tokenizer=Tokenizer(), settings=settings, keep="newest")
    expected = build_memory(model, [[BOS, *TEXT[-2:]], [BOS, *SECOND]], settings=settings.with_changes(limit=99))
    assert memory.token_N.tolist() == TEXT[-2:] + SECOND
    assert same(memory, expected)
