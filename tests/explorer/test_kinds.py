"""Every kind of exploration gives the figures of the command that it is about, and parts that make them up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from explorer_oracle import check_schema, column, joint_logp, knn_logp, packed

from fairseq.explorer.rules import Setting
from fairseq_cli import eval_lm, eval_lm_trime

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluated(explored_words, tmp_path):
    """Evaluate as the original commands do; returns figures and ln p of every token."""

    def call(program, *words):
        out = ["--eval-file", str(tmp_path / "e.json"), "--scores-file", str(tmp_path / "e.npz")]
        program.main([*explored_words, *map(str, words), *out])
        return json.loads((tmp_path / "e.json").read_text()), np.load(tmp_path / "e.npz")["logp"]

    return call


def compare(explanation, figures, logp):
    """Perplexity and every token's ln p are the evaluation's."""
    sums = explanation.combined(explanation.opening)["sums"]["mixed"]
    assert sums["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6)
    assert (sums["num_tokens"], sums["num_counted"]) == (figures["num_tokens"], figures["num_counted"])
    np.testing.assert_allclose(column(explanation, "mixed"), logp, atol=1e-6)
    check_schema(explanation)


def test_a_saved_file_is_the_evaluation_that_saved_it(explored, kept):
    explanation = explored("saved", kept.path)
    compare(explanation, kept.figures, kept.logp)
    assert explanation.opening == Setting(16, 0.3, 2.0)
    assert explanation.about()["notes"] == []


def test_another_setting_is_another_evaluation(explored, kept, evaluated, explored_store):
    figures, logp = evaluated(
        eval_lm, "--knnlm", "--dstore-filename", explored_store, "--k", 5, "--lmbda", 0.6, "--softmax-temp", 9
    )
    made = explored("saved", kept.path).combined(Setting(5, 0.6, 9.0))
    assert made["sums"]["mixed"]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6)
    np.testing.assert_allclose(packed(made["mixed"]), logp, atol=1e-6)


def test_candidates_make_up_the_mixture_by_the_published_formula(explored, kept):
    explanation = explored("saved", kept.path)
    lm, mixed = column(explanation, "lm"), column(explanation, "mixed")
    candidates = explanation.candidates(slice(0, len(lm)))
    own = knn_logp(packed(candidates["scores"]) / 2.0, packed(candidates["values"]), column(explanation, "token"))
    np.testing.assert_allclose(column(explanation, "memory"), own, atol=2e-5)
    np.testing.assert_allclose(mixed, np.logaddexp(lm + math.log(0.7), own + math.log(0.3)), atol=2e-5)


def test_an_evaluation_at_work_is_the_evaluation(explored, kept, explored_store, explored_words, data_bin):
    explanation = explored("eval-lm", *explored_words, *KNN, "--dstore-filename", explored_store)
    compare(explanation, kept.figures, kept.logp)
    saved = explored("saved", kept.path)
    for name in ("token", "lm", "memory", "nearest", "counted", "frequency"):
        np.testing.assert_allclose(column(explanation, name), column(saved, name), atol=1e-5, err_msg=name)
    details = explanation.details(7)
    logp = packed(details["lm"]["logp"])
    at = packed(details["lm"]["token"]).tolist().index(int(column(explanation, "token")[7]))
    assert logp[at] == pytest.approx(column(explanation, "lm")[7], abs=1e-5)
    assert np.exp(logp).sum() <= 1 + 1e-5


KNN = ("--knnlm", "--lmbda", "0.3", "--softmax-temp", "2", "--k", "16")


def test_retomaton_says_where_it_searched(explored, evaluated, explored_store, explored_words):
    words = (*KNN, "--dstore-filename", explored_store, "--retomaton", "--min-knns", 2, "--max-knns", 32)
    figures, logp = evaluated(eval_lm, *words)
    explanation = explored("eval-lm", *explored_words, *words)
    compare(explanation, figures, logp)
    searched, pointers = column(explanation, "searched"), column(explanation, "pointers")
    assert searched.sum() == figures["num_searched"]
    assert 0 < searched.sum() < len(searched)
    assert (pointers[searched == 0] >= 2).all()
    assert (pointers[searched == 1] < 2).all()
    candidates = explanation.candidates(slice(0, len(searched)))
    found = np.isfinite(packed(candidates["scores"])).sum(1)
    np.testing.assert_array_equal(found[searched == 0], pointers[searched == 0])
    assert explanation.opening.k is None


@pytest.mark.parametrize("mode", ["gn", "li"])
def test_trime_says_which_memory_paid(explored, evaluated, explored_store, explored_words, mode):
    words = ["--use-local", "--use-long", "--mem-size", 48, "--softmax-temp", 1.5, "--use-external", "--k", 16]
    words += ["--dstore-filename", explored_store, "--mode", mode, "--use-interp", "--interp-temp", 2.5, "--lmbda", 0.3]
    figures, logp = evaluated(eval_lm_trime, *words)
    explanation = explored("eval-lm-trime", *explored_words, *words)
    compare(explanation, figures, logp)
    assert explanation.table.sources == ["local", "long"]
    lm, norm, token = (column(explanation, name) for name in ("lm", "norm", "token"))
    candidates = explanation.candidates(slice(0, len(lm)))
    scores, values = packed(candidates["scores"]), packed(candidates["values"])
    sums = [(column(explanation, f"hit:{name}"), column(explanation, f"whole:{name}")) for name in ("local", "long")]
    if mode == "gn":
        scaled = scores / (1.5 * math.sqrt(explanation.rule.dim))
        sums.append((knn_logp(scaled, values, token, normalise=False), np.logaddexp.reduce(scaled, 1)))
    base = joint_logp(lm, norm, sums)
    mixed = np.logaddexp(base + math.log(0.7), knn_logp(scores / 2.5, values, token) + math.log(0.3))
    np.testing.assert_allclose(column(explanation, "mixed"), mixed, atol=5e-5)
    at = next(i for i in range(len(lm)) if explanation.details(i)["local"])
    local = explanation.details(at)["local_candidates"]
    own = packed(local["scores"]) / 1.5
    assert np.logaddexp.reduce(own) == pytest.approx(sums[0][1][at], abs=1e-5)


def test_saved_neighbours_of_trime_keep_the_sums_of_the_text(explored, evaluated, explored_store, tmp_path):
    words = ["--use-local", "--softmax-temp", 1.5, "--use-external", "--k", 8, "--dstore-filename", explored_store]
    words += ["--use-interp", "--interp-temp", 2.5, "--lmbda", 0.2]
    figures, logp = evaluated(eval_lm_trime, *words, "--save-retrieval", tmp_path / "r")
    explanation = explored("saved", tmp_path / "r")
    compare(explanation, figures, logp)
    assert (explanation.kind, explanation.table.sources) == ("trime", ["text"])
    assert explanation.opening == Setting(8, 0.2, 2.5, 1.5)


def test_a_decoder_that_is_mixed_in_is_part_of_the_model(explored, evaluated, explored_words, explored_store, trained):
    # Another epoch of the same model stands for a decoder that was trained on neighbours.
    words = ["--memory-decoder", trained / "checkpoint1.pt", "--decoder-weight", 0.4, *KNN]
    words += ["--dstore-filename", explored_store]
    figures, logp = evaluated(eval_lm, *words)
    explanation = explored("eval-lm", *explored_words, *words)
    compare(explanation, figures, logp)
    for at in (0, 11):
        lm = explanation.details(at)["lm"]
        place = packed(lm["token"]).tolist().index(int(column(explanation, "token")[at]))
        assert packed(lm["logp"])[place] == pytest.approx(column(explanation, "lm")[at], abs=1e-5)
    made = explanation.reader.read(explanation.reader.encode("w3 w9"), only_next=False)
    at = packed(made["details"][1]["lm"]["token"]).tolist().index(made["ids"][1])
    lm = packed(made["tokens"]["columns"]["lm"])[1]
    assert packed(made["details"][1]["lm"]["logp"])[at] == pytest.approx(lm, abs=1e-5)


def test_shards_are_shown_as_one_text(explored, evaluated, kept, explored_store, tmp_path):
    files = [tmp_path / f"r{shard}" for shard in range(2)]
    for shard, file in enumerate(files):
        part = ("--num-shards", 2, "--shard-id", shard, "--save-retrieval", file)
        evaluated(eval_lm, *KNN, "--dstore-filename", explored_store, *part)
    explanation = explored("saved", *files[::-1])
    np.testing.assert_allclose(column(explanation, "mixed"), kept.logp, atol=1e-5)
    with pytest.raises(ValueError, match="the files hold the shards 1 of 2"):
        explored("saved", files[1])


def test_trime_without_a_datastore(explored, evaluated, explored_words):
    words = ["--use-local", "--softmax-temp", 1.2]
    figures, logp = evaluated(eval_lm_trime, *words)
    explanation = explored("eval-lm-trime", *explored_words, *words)
    compare(explanation, figures, logp)
    assert explanation.about()["k"] == 0
    assert explanation.candidates(slice(0, 3)) is None
    hit, whole = column(explanation, "hit:local"), column(explanation, "whole:local")
    some = np.isfinite(whole)
    np.testing.assert_allclose(column(explanation, "memory")[some], hit[some] - whole[some], atol=1e-5)


def test_typed_text_is_scored_as_the_same_text_in_a_file(explored, explored_store, explored_words):
    explanation = explored("eval-lm", *explored_words, *KNN, "--dstore-filename", explored_store)
    reader = explanation.reader
    tokens = reader.encode("w3 w9 w28 w14")
    made = reader.read(tokens, only_next=False)
    assert made["ids"] == tokens
    assert made["about"]["num_tokens"] == 4
    assert made["tokens"]["text"] == ["w3", "w9", "w28", "w14"]
    # The last position of a shorter text says what the next token of the longer one has.
    shorter = reader.read(tokens[:3], only_next=True)
    assert "tokens" not in shorter
    said = dict(zip(packed(shorter["next"]["lm"]["token"]).tolist(), packed(shorter["next"]["lm"]["logp"])))
    lm = packed(made["tokens"]["columns"]["lm"])
    if tokens[3] in said:
        assert said[tokens[3]] == pytest.approx(lm[3], abs=1e-5)
    np.testing.assert_allclose(
        packed(shorter["next"]["candidates"]["scores"])[0], packed(made["candidates"]["scores"])[3], atol=1e-4
    )
    with pytest.raises(ValueError, match="token 5000 is not within"):
        reader.read([5000], only_next=True)
