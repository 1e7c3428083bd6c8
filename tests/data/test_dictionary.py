import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.dictionary import Dictionary

WORDS = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=5).filter(
    lambda word: len(word.split()) == 1
)


def test_specials_have_the_numbers_checkpoints_rely_on():
    d = Dictionary()
    assert [d.bos(), d.pad(), d.eos(), d.unk()] == [0, 1, 2, 3]
    assert d.symbols == ["<s>", "<pad>", "</s>", "<unk>"]
    assert (d.index("never seen"), d[99]) == (3, "<unk>")


@given(st.dictionaries(WORDS, st.integers(1, 5)), st.integers(-1, 4), st.integers(-1, 10), st.integers(1, 8))
def test_finalize_orders_cuts_and_pads(counts, threshold, nwords, factor):
    d = Dictionary.from_counts(Counter(counts), threshold=threshold, nwords=nwords, padding_factor=factor)
    special = {"<s>", "<pad>", "</s>", "<unk>"}
    ranked = sorted((-n, word) for word, n in counts.items() if word not in special)
    ranked = ranked[: max(0, nwords - len(special))] if nwords > 0 else ranked
    expected = [word for n, word in ranked if -n >= threshold]
    assert d.symbols[4 : 4 + len(expected)] == expected
    assert len(d) % factor == 0
    assert len(d) - 4 - len(expected) < factor
    assert d.symbols[4 + len(expected) :] == [f"madeupword{i:04d}" for i in range(len(d) - 4 - len(expected))]


@given(st.dictionaries(WORDS, st.integers(1, 9)))
def test_save_and_load_give_the_same_dictionary(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("d") / "dict.txt"
    made = Dictionary.from_counts(Counter(counts))
    made.save(path)
    read = Dictionary.load(path)
    assert (read.symbols, read.counts[4:], read.indices) == (made.symbols, made.counts[4:], made.indices)
    assert read.digest() == made.digest()
    read.save(path)
    assert path.read_bytes() == made.to_bytes()


def test_file_format(tmp_path):
    d = Dictionary.from_counts(Counter(["b", "b", "a", "c", "c"]), padding_factor=4)
    d.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == b"b 2\nc 2\na 1\nmadeupword0000 0\n"
    assert sorted(os.listdir(tmp_path)) == ["dict.txt"]


def test_overwrite_gives_a_known_symbol_a_number_of_its_own(tmp_path):
    path = tmp_path / "dict.txt"
    text = "the 5\n<s> 3 #fairseq:overwrite\nthe 1 #fairseq:overwrite\n"
    path.write_text(text)
    d = Dictionary.load(path)
    assert (d.index("<s>"), d.index("the"), d.bos(), len(d)) == (5, 6, 0, 7)
    assert d.to_bytes() == text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the 5\nof\n", "line 2: expected 'symbol count', got 'of'"),
        (b"the 5\n\n", "line 2: expected 'symbol count'"),
        (b"the x\n", "line 1: expected 'symbol count', got 'the x'"),
        (b"the #fairseq:overwrite\n", "line 1: expected"),
        (b"the 5\nof 4\nthe 3\n", "line 3: 'the' is a duplicate .of number 4."),
        (b"<unk> 7\n", "line 1: '<unk>' is a duplicate"),
        (b"the 5\n\xff 3\n", "line 2: .*utf-8"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="dict.txt, " + message):
        Dictionary.load(path)


def test_encoding_and_its_inverse():
    d = Dictionary.from_counts(Counter(["un@@", "der", "stand"]))
    tokens = d.encode_line(" un@@  der\tstand what\n", add_if_not_exist=False)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [*map(d.index, ["un@@", "der", "stand"]), d.unk(), d.eos()]
    assert d.encode_line("der", append_eos=False).tolist() == [d.index("der")]
    assert d.string(tokens) == "un@@ der stand <unk>"
    assert d.string(tokens.numpy(), bpe_symbol="@@ ") == "under stand <unk>"
    assert d.string(np.stack([tokens, tokens])) == "un@@ der stand <unk>\nun@@ der stand <unk>"
    assert d.string([]) == ""


def test_sentencepiece_marks_are_joined():
    d = Dictionary.from_counts(Counter(["\u2581un", "der", "\u2581stand"]))
    assert d.string(d.encode_line("\u2581un der \u2581stand"), "sentencepiece") == "under stand"


def test_digest_depends_on_the_order_alone():
    one, two, other = (Dictionary.from_counts(Counter(text.split())) for text in ("a a b", "a a a b", "a b b"))
    assert one.digest() == two.digest() != other.digest()


def test_a_line_adds_its_symbols_as_in_fairseq():
    d, same = Dictionary(), Dictionary()
    seen = []
    tokens = d.encode_line("a b a", consumer=lambda symbol, number: seen.append((symbol, number)), reverse_order=True)
    assert (tokens.tolist(), tokens.dtype.itemsize) == ([4, 5, 4, 2], 4)
    assert seen == [("a", 4), ("b", 5), ("a", 4)]
    assert d.counts[4:] == [2, 1]
    assert d != same
    same.add_counts({"a": 1, "b": 7})
    assert d == same  # the numbers are the same; counts do not matter
    assert d != "a b"
