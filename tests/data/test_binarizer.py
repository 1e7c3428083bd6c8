import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.binarizer import binarize, count_symbols, find_chunks, read_chunk
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

TEXT = st.text(st.sampled_from("ab\u00e9 \t\n\r\u2028\u3000"), max_size=60)


def lines_as_python_reads_them(path):
    with open(path, encoding="utf-8") as file:
        return list(file)


@given(TEXT, st.integers(1, 12))
def test_pieces_are_whole_lines_and_all_of_the_file(tmp_path_factory, text, chunk_bytes):
    path = str(tmp_path_factory.mktemp("t") / "text")
    with open(path, "wb") as file:
        file.write(text.encode())
    chunks = [read_chunk(chunk) for chunk in find_chunks(path, chunk_bytes)]
    assert "".join(chunks) == text.replace("\r\n", "\n").replace("\r", "\n")
    assert all(chunk.endswith("\n") for chunk in chunks[:-1])


@given(TEXT)
def test_every_line_is_a_sentence(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("t")
    path = str(folder / "text")
    with open(path, "wb") as file:
        file.write(text.encode())
    dictionary = Dictionary.from_counts(count_symbols([path]), threshold=2)
    report = binarize(path, dictionary, str(folder / "out"))
    expected = [
        dictionary.encode_line(line, add_if_not_exist=False).tolist() for line in lines_as_python_reads_them(path)
    ]
    found = MMapIndexedDataset(folder / "out")
    assert [sentence.tolist() for sentence in found] == expected
    assert report.num_sentences == len(expected)
    assert report.num_tokens == sum(map(len, expected))
    assert report.num_replaced == sum(sentence.count(dictionary.unk()) for sentence in expected)


def test_the_literal_unknown_word_is_not_counted_as_replaced(tmp_path):
    (tmp_path / "text").write_text("a <unk> b\n")
    dictionary = Dictionary()
    dictionary.add_symbol("a")
    report = binarize(str(tmp_path / "text"), dictionary, str(tmp_path / "out"))
    assert report.num_replaced == 1
    assert MMapIndexedDataset(tmp_path / "out")[0].tolist() == [4, 3, 3, 2]


def test_several_processes_give_the_same_bytes(tmp_path, monkeypatch):
    words = np.random.default_rng(0).integers(0, 500, 20000).tolist()
    path = tmp_path / "text"
    path.write_text("".join(f"{word}{' ' if word % 7 else chr(10)}" for word in words))
    monkeypatch.setattr("fairseq.data.binarizer.find_chunks", lambda path: find_chunks(path, 5000))
    counts = count_symbols([str(path)], workers=1)
    assert count_symbols([str(path)], workers=3) == counts
    dictionary = Dictionary.from_counts(counts, nwords=300)
    reports = [binarize(str(path), dictionary, str(tmp_path / f"w{n}"), workers=n) for n in (1, 3)]
    assert reports[0] == reports[1]
    for end in (".bin", ".idx"):
        assert (tmp_path / f"w1{end}").read_bytes() == (tmp_path / f"w3{end}").read_bytes()


def test_bytes_that_are_no_text_are_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"fine\nfine\nnot \xff fine\n")
    with pytest.raises(ValueError, match=r"text, line 3: not UTF-8"):
        count_symbols([str(path)])


def test_an_error_leaves_no_files(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        binarize(str(path), Dictionary(), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
