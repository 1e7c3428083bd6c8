"""Pairs of sentences prepared from small archives, against lines that are known."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq.data.corpora import parallel
from fairseq.data.corpora.corpora import SPLITS

pytest.importorskip("subword_nmt")


def packed(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode("utf-8")))
    return path


def six_files(folder: Path, **texts: str) -> list[Path]:
    """Multi30k's files in the corpus's order, with given texts."""
    return [packed(folder / archive.name, texts[archive.name.split(".")[1]]) for archive in parallel.MULTI30K.archives]


def test_multi30k_is_lower_case_first_and_cut_by_merges_of_both_sides(tmp_path: Path) -> None:
    corpus = replace(parallel.MULTI30K, merges=400)
    files = six_files(tmp_path, de="Ein Hund & ein Mann's.\nEin\u2028Hund.\n" * 3, en="A dog & a man's.\nA dog.\n" * 3)
    parallel.prepare(corpus, corpus.read(files), tmp_path / "text")
    assert parallel.is_prepared(corpus, tmp_path / "text")
    lines = (tmp_path / "text" / "train.en").read_text(encoding="utf-8").splitlines()
    assert lines == ["a dog & a man 's .", "a dog ."] * 3  # whole words: 400 merges are more than there are
    assert (tmp_path / "text" / "test.de").read_text(encoding="utf-8").count("\n") == 6  # a line separator ends none
    merges = (tmp_path / "text" / parallel.CODES).read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert "e in</w>" in merges
    assert "d og</w>" in merges


def test_pieces_of_other_codes(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\nh u\nhu n\n", encoding="utf-8")
    pairs = {split: [("Hund", "dog")] for split in SPLITS}
    parallel.prepare(parallel.MULTI30K, pairs, tmp_path, codes)
    assert (tmp_path / "test.de").read_text(encoding="utf-8") == "hun@@ d\n"
    assert (tmp_path / "test.en").read_text(encoding="utf-8") == "d@@ o@@ g\n"


def test_sides_of_different_lengths_are_told_with_both(tmp_path: Path) -> None:
    files = six_files(tmp_path, de="Eins.\nZwei.\n", en="One.\n")
    with pytest.raises(ValueError, match="have 2 and 1 lines"):
        parallel.read_multi30k(files)


def iwslt(path: Path) -> Path:
    """An archive like IWSLT's: 46 plain pairs, tags, and pairs that are too long, too uneven or empty."""
    talk = "<url>http://x</url>\n<talkid>1</talkid>\n<title> {} </title>\n"
    train = {"de": talk.format("\u00dcber \u00c4pfel"), "en": talk.format("On apples")}
    for number in range(45):
        train["de"] += f"Satz {number} .\n"
        train["en"] += f"Sentence {number} .\n"
    train["de"] += "w " * 200 + "\n" + "eins zwei drei vier\n" + "\n"
    train["en"] += "w " * 200 + "\n" + "one two\n" + "nothing\n"
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, text: str) -> None:
            data = text.encode("utf-8")
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for language, text in train.items():
            add(f"train.tags.de-en.{language}", text)
            for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
                body = f'<seg id="1"> It\u2019s {name} &amp; {language} </seg>'
                add(f"IWSLT14.{name}.de-en.{language}.xml", f"<mteval><doc>{body}</doc></mteval>")
    return path


def test_iwslt14_is_cleaned_and_every_23rd_pair_is_valid(tmp_path: Path) -> None:
    corpus = replace(parallel.IWSLT14, merges=2000)
    parallel.prepare(corpus, corpus.read([iwslt(tmp_path / "de-en.tgz")]), tmp_path)
    text = {name: (tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("train.de", "valid.en")}
    assert len(text["train.de"]) == 44
    assert text["train.de"][0].replace("@@ ", "") == "\u00fcber \u00e4pfel"
    # the title is the first pair, so that the 23rd is sentence 21
    assert [line.replace("@@ ", "") for line in text["valid.en"]] == ["sentence 21 .", "sentence 44 ."]
    test = (tmp_path / "test.en").read_text(encoding="utf-8").replace("@@ ", "").splitlines()
    assert test[1] == "it &apos;s tedx.dev2012 &amp; en"
    assert len(test) == 5


def test_an_archive_of_something_else_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "de-en.tgz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"holds no train\.tags\.de-en\.de"):
        parallel.read_iwslt14([tmp_path / "de-en.tgz"])
