"""Exploring translations: beams are generate.py's, and the memory's part of the best one adds up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from explorer_oracle import check_schema, column, knn_logp, packed

from fairseq_cli import generate

pytestmark = pytest.mark.slow


def test_beams_and_memory_of_each_translation(explored_pairs, explored, tmp_path):
    words, folder = explored_pairs
    knn = ["--knnmt", "--dstore-filename", str(folder / "store"), "--k", "6", "--lmbda", "0.4", "--knn-temp", "5"]
    generate.main([*words, *knn, "--nbest", "3", "--results-path", str(tmp_path)])
    lines = (tmp_path / "generate-test.txt").read_text().splitlines()
    explanation = explored("generate", *words, *knn, "--sentences", 4)
    token, sentence = column(explanation, "token"), column(explanation, "document")
    assert set(sentence) == {0, 1, 2, 3}
    check_schema(explanation)
    for number in range(4):
        first = int(np.flatnonzero(sentence == number)[0])
        shown = explanation.details(first)["sentence"]
        theirs = [line.split("\t")[1:] for line in lines if line.startswith(f"D-{number}\t")]
        assert [beam["text"] for beam in shown["beams"]] == [text for _, text in theirs]
        scores = [float(score) * math.log(2) for score, _ in theirs]
        assert [beam["score"] for beam in shown["beams"]] == pytest.approx(scores, abs=1e-5)
        best = column(explanation, "mixed")[sentence == number]
        assert best.sum() / len(best) == pytest.approx(scores[0], abs=1e-5)
        assert shown["source"] == (folder / "test.a").read_text().splitlines()[number]
        assert shown["reference"] == (folder / "test.b").read_text().splitlines()[number]
    candidates = explanation.candidates(slice(0, len(token)))
    own = knn_logp(packed(candidates["scores"]) / 5, packed(candidates["values"]), token)
    mixed = np.logaddexp(column(explanation, "lm") + math.log(0.6), own + math.log(0.4))
    np.testing.assert_allclose(column(explanation, "mixed"), mixed, atol=2e-5)
    sources = (folder / "train.a").read_text().splitlines()
    targets = (folder / "train.b").read_text().splitlines()
    for neighbor in explanation.details(0)["neighbors"]:
        assert neighbor["source"] == sources[neighbor["document"]]
        words_ = [*targets[neighbor["document"]].split(), "</s>"]
        assert words_[neighbor["offset"]] == neighbor["text"]
    made = explanation.reader.read(explanation.reader.encode("a1 a4 a5"), only_next=False)
    assert made["next"] is None
    assert made["details"][0]["sentence"]["source"] == "a1 a4 a5"
    with pytest.raises(ValueError, match="there is no sentence"):
        explanation.reader.read([2], only_next=False)


def test_pairs_like_the_sentence(explored_pairs, explored):
    words, folder = explored_pairs
    more = ["--knnmt", "--sentence-pairs", "2", "--knn-lambda-type", "distance", "--knn-temp", "20", "--k", "4"]
    explanation = explored("generate", *words, *more, "--sentences", 2)
    assert explanation.rule.kind == "given"
    details = explanation.details(0)
    assert len(details["sentence"]["pairs"]) == 2
    check_schema(explanation)
    assert all(neighbor["row"] == -1 for neighbor in details["neighbors"])
    both = dict(zip(packed(details["mixed"]["token"]).tolist(), packed(details["mixed"]["logp"])))
    assert both[int(column(explanation, "token")[0])] == pytest.approx(column(explanation, "mixed")[0], abs=1e-5)


def test_saved_references_are_shown_by_sentence(explored_pairs, explored, tmp_path):
    words, folder = explored_pairs
    more = ["--knnmt", "--dstore-filename", str(folder / "store"), "--k", "6", "--lmbda", "0.4", "--knn-temp", "5"]
    more += ["--score-reference", "--save-retrieval", str(tmp_path / "r")]
    generate.main([*words, *more, "--results-path", str(tmp_path)])
    figures = json.loads((tmp_path / "generate-test.run.json").read_text())["figures"]
    explanation = explored("saved", tmp_path / "r")
    sums = explanation.combined(explanation.opening)["sums"]["mixed"]
    assert sums["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6)
    assert explanation.unit == "sentence"
    assert set(column(explanation, "document")) == set(range(6))


def test_what_cannot_be_explored_is_one_line(explored_pairs, explored):
    words, folder = explored_pairs
    with pytest.raises(ValueError, match="no memory is named"):
        explored("generate", *words)
    with pytest.raises(ValueError, match="--sentences must be at least 1, got 0"):
        explored("generate", *words, "--sentences", 0)
