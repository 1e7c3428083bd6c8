import json
import math
from collections import Counter

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.bm25 import index as bm25
from fairseq.data.bm25 import kernels as bm25_kernels
from fairseq.data.bm25.index import open_index

K1, B = 0.9, 0.4


def write(path, texts):
    path.write_text(json.dumps([{"id": str(i), "contents": t} for i, t in enumerate(texts)]), encoding="utf-8")
    return path


def words_of(text):
    """The words of these tests are of two letters and more and none is a stop word."""
    return text.lower().split()


def by_formula(texts):
    """BM25 as Lucene computes it, one pair of documents at a time (S. Robertson and H. Zaragoza, 2009)."""
    documents = [Counter(words_of(text)) for text in texts]
    count, average = len(documents), sum(sum(d.values()) for d in documents) / len(documents)
    holding = Counter(word for document in documents for word in document)
    scores = np.zeros((count, count))
    for q, query in enumerate(documents):
        for d, document in enumerate(documents):
            for word, times in query.items():
                idf = math.log(1 + (count - holding[word] + 0.5) / (holding[word] + 0.5))
                length = 1 - B + B * sum(document.values()) / average
                scores[q, d] += times * idf * document[word] / (document[word] + K1 * length)
    return scores


def some_texts(count, words, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.zipf(1.3, int(rng.integers(1, 60))) if i < words) for _ in range(count)]


def require_best(found, scores, own, num_neighbors):
    """The right number of documents, none of them itself, in falling order, and none dropped that is better."""
    allowed = [d for d in range(len(scores)) if d != own and scores[d] > 0]
    assert len(found) == len(set(found)) == min(num_neighbors, len(allowed))
    assert set(found) <= set(allowed)
    best = sorted((scores[d] for d in allowed), reverse=True)[:num_neighbors]
    np.testing.assert_allclose([scores[d] for d in found], best, rtol=1e-5)


@pytest.mark.parametrize("num_neighbors", [1, 5, 200])
@pytest.mark.parametrize("topics", [0, 5])
def test_neighbors_are_those_of_the_published_formula(tmp_path, num_neighbors, topics):
    """Without topics all documents are candidates to the last term; with topics reading stops early."""
    texts = some_texts(150, 80)
    if topics:
        texts = [f"{text} {f'topic{number % topics} ' * 9}" for number, text in enumerate(texts)]
    texts[7] = ""
    texts[70] = texts[9]
    texts[71] = texts[9].upper()
    scores = by_formula(texts)
    index = open_index(tmp_path / "index", write(tmp_path / "segments.json", texts))
    for first in (0, 64, 128):
        found = index.search(texts[first : first + 64], first, num_neighbors)
        assert len(found) == len(texts[first : first + 64])
        for own, numbers in enumerate(found, start=first):
            require_best(numbers, scores[own], own, num_neighbors)
    assert index.search([texts[7]], 7, 5) == [[]]


def test_reading_stops_once_few_documents_can_be_among_the_best(tmp_path):
    """Ten documents share rare words; the others have one word that is everywhere."""
    rare = [" ".join(f"rare{word}" for word in range(20))] * 10
    texts = [f"common {text}" for text in rare + [f"own{number}" for number in range(500)]]
    index = open_index(tmp_path / "index", write(tmp_path / "segments.json", texts))
    found = {}
    for k in (3, 400):
        terms, counts = index._terms(texts[0])
        bounds = counts * index._largest_V[terms]
        room, order = index._make_room(), np.argsort(-bounds / index._length_V[terms])
        given = (terms[order], counts[order], bounds[order], 0, k, room.score_D, room.candidate_D)
        number = bm25_kernels.candidates(index._starts_V, index._document_P, index._weight_P, *given)
        found[k] = room.candidate_D[:number].tolist()
    assert found == {3: list(range(1, 10)), 400: list(range(1, 510))}
    assert index.search(texts[:1], 0, 12) == [list(range(1, 13))]


@given(st.text(st.characters(max_codepoint=127), max_size=40) | st.text(max_size=40))
def test_words_are_those_of_bm25s(text):
    words = bm25._words(text.lower(), bm25._tokenizer().splitter)
    assert [word for word in words if len(word) > 1] == bm25._tokenizer().splitter(text.lower())


def test_neighbors_are_those_bm25s_retrieves(tmp_path):
    texts = some_texts(100, 60, seed=1)
    index = open_index(tmp_path / "index", write(tmp_path / "segments.json", texts))
    theirs = bm25s.BM25.load(tmp_path / "index")
    numbers, scores = theirs.retrieve([words_of(text) for text in texts[:20]], k=6, show_progress=False)
    found = index.search(texts[:20], 0, 5)
    for query in range(20):
        expected = {int(d): s for d, s in zip(numbers[query], scores[query]) if d != query}
        ours = [expected.get(d, -1.0) for d in found[query]]
        np.testing.assert_allclose(ours, list(expected.values())[:5], rtol=1e-5)


def test_equal_documents_come_in_order_and_not_themselves(tmp_path):
    texts = ["alpha beta gamma"] * 6 + ["delta epsilon"] * 2 + ["zeta"]
    index = open_index(tmp_path / "index", write(tmp_path / "segments.json", texts))
    assert index.search(texts, 0, 3) == [
        *([1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]),
        *([7], [6], []),
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 1000))
def test_what_is_found_does_not_depend_on_what_is_searched_together(tmp_path_factory, count, size, seed):
    folder = tmp_path_factory.mktemp("bm25")
    texts = some_texts(count, 40, seed=seed) + ["word"]
    index = open_index(folder / "index", write(folder / "segments.json", texts))
    together = index.search(texts[:60], 0, 4)
    apart = [found for i in range(0, 60, size) for found in index.search(texts[:60][i : i + size], i, 4)]
    assert together == apart


def test_an_index_is_kept_and_bound_to_its_segments(tmp_path, monkeypatch):
    texts = some_texts(20, 30)
    path = write(tmp_path / "segments.json", texts)
    (tmp_path / "index").mkdir()  # an empty folder is as good as none
    first = open_index(tmp_path / "index", path).search(texts[:5], 0, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index", "segments.json"]
    monkeypatch.setattr(bm25, "_build", None)
    assert open_index(tmp_path / "index", path).search(texts[:5], 0, 3) == first
    write(path, [*texts, "one more"])
    with pytest.raises(ValueError, match=r"was built from other segments \(20 of them.*remove the folder"):
        open_index(tmp_path / "index", path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    path = write(tmp_path / "segments.json", ["alpha"])
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not an index of bm25_search.py"):
        open_index(tmp_path / "index", path)
    assert [entry.name for entry in (tmp_path / "index").iterdir()] == ["thesis.tex"]


def test_segments_without_words_are_reported(tmp_path):
    with pytest.raises(ValueError, match="holds 2 segments and no searchable word"):
        open_index(tmp_path / "index", write(tmp_path / "segments.json", ["the", ", ."]))
    assert not (tmp_path / "index").exists()


def test_an_unfinished_index_is_rebuilt(tmp_path):
    texts = some_texts(20, 30)
    path = write(tmp_path / "segments.json", texts)
    (tmp_path / "index.tmp").mkdir()
    (tmp_path / "index.tmp" / "data.csc.index.npy").write_bytes(b"half of it")
    (tmp_path / "index.lock").touch()  # its holder was killed
    assert open_index(tmp_path / "index", path).num_documents == 20
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index", "segments.json"]
