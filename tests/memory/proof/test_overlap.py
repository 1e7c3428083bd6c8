"""Shared n-grams and whole documents, against sets of n-grams made one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.proof import overlap as module
from fairseq.memory.proof.overlap import LENGTHS, overlap


def covered_by_hand(text, values, n):
    """Tokens within n-grams that both have."""
    held = {tuple(values[i : i + n]) for i in range(len(values) - n + 1)}
    inside = np.zeros(len(text), bool)
    for i in range(len(text) - n + 1):
        if tuple(text[i : i + n]) in held:
            inside[i : i + n] = True
    return int(inside.sum())


def split_into(values, edges):
    return ChunkedArray(np.split(values, edges))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("edges", [[], [1, 5, 300], [100, 101, 102]])
def test_counts_are_those_of_sets(dtype, edges, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 64)  # several runs a chunk, some shorter than an n-gram
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, 400).astype(dtype)  # few tokens: n-grams repeat
    text = rng.integers(0, 4, 300)
    text[20:60] = values[90:130]
    text[200:209] = values[0:9]
    found = overlap(text, np.array([0, 100]), split_into(values, edges))
    assert found.covered == {n: covered_by_hand(text.tolist(), values.tolist(), n) for n in LENGTHS}
    assert found.covered[13] >= 40


def test_whole_documents_are_named_and_parts_are_not():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 500, 2000)
    other = rng.integers(500, 900, 100)
    text = np.concatenate([other, values[700:760], values[10:40], other[:20], values[1990:2000]])
    starts = np.array([0, 100, 160, 210])  # other; whole; a part and more; whole, but shorter than an n-gram
    found = overlap(text, starts, ChunkedArray([values]))
    assert found.duplicates == [1]
    assert found.num_documents == 4


def test_deleted_rows_are_not_in_the_store(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 64)
    rng = np.random.default_rng(3)
    values = rng.integers(0, 500, 400)
    text, starts = np.concatenate([values[100:160], values[300:340]]), np.array([0, 60])
    deleted = np.r_[130, np.arange(290, 350)]
    found = overlap(text, starts, split_into(values, [200]), deleted)
    assert found.covered == {13: 59, 8: 59}  # what is left on both sides of row 130
    assert found.duplicates == []
    twice = np.concatenate([values, values[300:340]])
    assert overlap(text, starts, ChunkedArray([twice]), deleted).duplicates == [1]
    assert values.min() >= 0  # the store itself is as it was


def test_a_document_is_found_though_its_start_stands_elsewhere_too():
    rng = np.random.default_rng(2)
    document, filler = rng.integers(0, 500, 60), rng.integers(0, 500, 50)
    values = np.concatenate([document[:30], filler, document])
    assert overlap(document, np.array([0]), ChunkedArray([values])).duplicates == [0]
    broken = np.concatenate([document[:30], filler, document[28:]])  # every n-gram, but not in one piece
    assert overlap(document, np.array([0]), ChunkedArray([broken])).duplicates == []


def test_verdicts_say_what_is_held():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 500, 3000)
    clean = overlap(rng.integers(500, 900, 300), np.array([0]), ChunkedArray([values])).verdict("store")
    assert clean.passed
    assert clean.words == "store shares 0.00% in 13-grams and 0.00% in 8-grams with the text"
    held = overlap(values[:300], np.arange(0, 300, 20), ChunkedArray([values])).verdict("store", "block")
    assert held.passed is False
    assert "100.00% in 13-grams" in held.words
    assert "holds 15 of its 15 blocks whole: number 0, 1," in held.words
    text = rng.integers(500, 900, 300)
    text[40:60] = values[40:60]
    much = overlap(text, np.array([0]), ChunkedArray([values])).verdict("store")
    assert much.passed is False
    assert "more than 5% is no quotation" in much.words


def test_texts_shorter_than_an_n_gram_share_none():
    found = overlap(np.arange(5), np.array([0]), ChunkedArray([np.arange(5)]))
    assert found.covered == {13: 0, 8: 0}
    assert overlap(np.empty(0, np.int64), np.array([0]), ChunkedArray([np.arange(50)])).share(13) == 0.0
