"""fairseq-score against BLEU by its formula (Papineni et al., 2002, sec. 2)."""

import io
import math
import re
from collections import Counter

import pytest

from fairseq_cli import score

SYSTEM = ["the cat sat on the mat today", "a dog runs over the green hill", "it is The house"]
REFERENCE = ["the cat sat on the mat", "the dog runs over a green hill", "it was the house over there"]


def formula(pairs, order, add=0):
    """Score, precisions and lengths; ``add`` is added to the counts of longer n-grams."""
    found, whole = [0] * order, [0] * order
    for one, other in pairs:
        for n in range(1, order + 1):
            grams, wanted = (Counter(zip(*(words[i:] for i in range(n)))) for words in (one.split(), other.split()))
            found[n - 1] += sum((grams & wanted).values())
            whole[n - 1] += sum(grams.values())
    for n in range(1, order):
        found[n], whole[n] = found[n] + add, whole[n] + add
    ours, theirs = (sum(len(pair[i].split()) for pair in pairs) for i in (0, 1))
    penalty = min(1.0, math.exp(1 - theirs / ours))
    mean = sum(math.log(f / w) for f, w in zip(found, whole)) / order if all(found) else -math.inf
    precisions = [100 * f / w for f, w in zip(found, whole)]
    return 100 * penalty * math.exp(mean), precisions, penalty, ours, theirs


def line(pairs, order, add=0):
    value, precisions, penalty, ours, theirs = formula(pairs, order, add)
    shown = "/".join(f"{p:.1f}" for p in precisions)
    return (
        f"BLEU{order} = {value:.2f}, {shown} (BP={penalty:.3f}, ratio={ours / theirs:.3f}, syslen={ours}, "
        f"reflen={theirs})"
    )


@pytest.fixture
def files(tmp_path):
    for name, lines in (("sys", SYSTEM), ("ref", REFERENCE)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return ["--sys", str(tmp_path / "sys"), "--ref", str(tmp_path / "ref")]


def lower(texts):
    return [text.lower() for text in texts]


@pytest.mark.parametrize("order", [1, 3, 4])
def test_a_text_is_scored_by_the_formula(files, order, capsys):
    score.main([*files, "--order", str(order)])
    assert capsys.readouterr().out.strip() == line(list(zip(SYSTEM, REFERENCE)), order)


def test_case_is_ignored_on_request(files, capsys):
    score.main([*files, "--ignore-case"])
    assert capsys.readouterr().out.strip() == line(list(zip(lower(SYSTEM), lower(REFERENCE))), 4)


def test_sentences_are_scored_with_added_counts(files, capsys):
    score.main([*files, "--sentence-bleu"])
    expected = [f"{n} {line([pair], 4, add=1)}" for n, pair in enumerate(zip(SYSTEM, REFERENCE))]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_system_may_come_from_standard_input(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(SYSTEM) + "\n"))
    score.main(files[2:])
    assert capsys.readouterr().out.strip() == line(list(zip(SYSTEM, REFERENCE)), 4)


def test_sacrebleu_prints_its_signature(files, capsys):
    score.main([*files, "--sacrebleu"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("BLEU = ")
    assert "tok:13a" in second


def test_texts_of_different_length_are_rejected_with_both_counts(files, tmp_path):
    (tmp_path / "sys").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="has 2 lines, .* has 3;"):
        score.main(files)


def test_a_missing_reference_is_named(files):
    with pytest.raises(ValueError, match="--ref names no reference"):
        score.main(files[:2])


def test_a_baseline_is_compared_by_paired_bootstrap(tmp_path, capsys):
    rows = [
        f"the {one} dog sees a {other} house ." for one in "old young big".split() for other in "red blue".split()
    ] * 5
    texts = {"ref": rows, "good": rows[:-3] + ["a cat ."] * 3, "bad": [row.replace("dog", "cat") for row in rows]}
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    def told(system, baseline):
        words = ["--sys", str(tmp_path / system), "--ref", str(tmp_path / "ref"), "--sacrebleu"]
        score.main([*words, "--baseline", str(tmp_path / baseline)])
        first, _, last = capsys.readouterr().out.splitlines()
        bleu, other, p = re.match(r"([\d.]+) \+- [\d.]+ against ([\d.]+) of .*: p = ([\d.]+) ", last).groups()
        assert f"BLEU = {bleu} " in first
        return float(bleu), float(other), float(p)

    good, bad, p = told("good", "bad")
    assert told("bad", "good") == (bad, good, p)
    assert good > bad + 10
    assert p < 0.01
    assert told("good", "good")[2] > 0.5
    with pytest.raises(ValueError, match="--baseline compares detokenised text; give --sacrebleu too"):
        score.main(
            ["--sys", str(tmp_path / "good"), "--ref", str(tmp_path / "ref"), "--baseline", str(tmp_path / "bad")]
        )
