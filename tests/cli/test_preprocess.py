import dataclasses
import logging
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from fairseq.config import flag_names
from fairseq.data.binarizer import CHUNK_BYTES
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq_cli.preprocess import IGNORED, PreprocessConfig, main

TRAIN = "the cat sat\n\nthe mat\n"
VALID = "the dog sat\n"


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder with a little text, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_text(TRAIN)
    (tmp_path / "valid").write_text(VALID)
    (tmp_path / "test").write_text("cat\n")
    for lang, words in (("de", "das Haus ist gross"), ("en", "the house is big big")):
        for split in ("train", "valid"):
            (tmp_path / f"{split}.{lang}").write_text(words + "\n")
    return tmp_path


def preprocess(*words):
    main([str(word) for word in words])


def files_in(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def strings(folder, name, dictionary="dict.txt"):
    words = Dictionary.load(os.path.join(folder, dictionary))
    return [words.string(tokens) for tokens in MMapIndexedDataset(os.path.join(folder, name))]


def test_text_of_a_language_model(text, caplog):
    caplog.set_level(logging.INFO)
    preprocess(
        "--only-source", "--trainpref", "train", "--validpref", "valid", "--testpref", "test", "--destdir", "out"
    )
    assert sorted(files_in("out")) == sorted(
        ["dict.txt", *(f"{split}.{end}" for split in ("train", "valid", "test") for end in ("bin", "idx", "sums.json"))]
    )
    assert (text / "out/dict.txt").read_text() == "the 2\ncat 1\nmat 1\nsat 1\n"
    assert strings("out", "train") == ["the cat sat", "", "the mat"]
    assert strings("out", "valid") == ["the <unk> sat"]
    assert "[None] Dictionary: 8 types" in caplog.text
    assert "[None] train: 3 sents, 8 tokens, 0.0% replaced by <unk>" in caplog.text
    assert "[None] valid: 1 sents, 4 tokens, 25.0% replaced by <unk>" in caplog.text


def test_every_line_ends_with_eos(text):
    preprocess("--only-source", "--trainpref", "train")
    data = MMapIndexedDataset("data-bin/train")
    assert [sentence[-1] for sentence in data] == [2, 2, 2]
    assert data.sizes.tolist() == [4, 1, 3]


def test_characters_as_decimal_codes(text):
    (text / "codes").write_text("116 104 101 32\n32 101\n")
    preprocess("--only-source", "--trainpref", "codes", "--destdir", "out", "--padding-factor", 1)
    assert (text / "out/dict.txt").read_text() == "101 2\n32 2\n104 1\n116 1\n"
    assert strings("out", "train") == ["116 104 101 32", "32 101"]


def test_limits_of_the_dictionary(text):
    preprocess("--only-source", "--trainpref", "train", "--thresholdsrc", 2, "--padding-factor", 1, "--destdir", "a")
    assert (text / "a/dict.txt").read_text() == "the 2\n"
    preprocess("--only-source", "--trainpref", "train", "--nwordssrc", 6, "--padding-factor", 1, "--destdir", "b")
    assert (text / "b/dict.txt").read_text() == "the 2\ncat 1\n"
    assert strings("b", "train") == ["the cat <unk>", "", "the <unk>"]


def test_nwords_counts_the_special_symbols_as_fairseq_does(text):
    preprocess("--only-source", "--trainpref", "train", "--nwordssrc", 7, "--padding-factor", 8, "--destdir", "c")
    words = [line.split()[0] for line in (text / "c/dict.txt").read_text().splitlines()]
    assert (len(words), words[3:]) == (4, ["madeupword0000"])
    with pytest.raises(ValueError, match="--nwordssrc 4 counts the 4 special symbols and so keeps no word"):
        preprocess("--only-source", "--trainpref", "train", "--nwordssrc", 4, "--destdir", "d")


def test_the_padding_symbol_in_text_is_reported(text, caplog):
    (text / "pads").write_text("a <pad> b\n<pad>\n")
    preprocess("--only-source", "--trainpref", "pads", "--destdir", "out", "--padding-factor", 1)
    assert (text / "out/dict.txt").read_text() == "a 1\nb 1\n"
    assert [row.tolist() for row in MMapIndexedDataset("out/train")] == [[4, 1, 5, 2], [1, 2]]
    assert "pads holds <pad> 2 times" in caplog.text


def test_dict_only_writes_no_data(text):
    preprocess("--only-source", "--trainpref", "train", "--destdir", "out", "--dict-only")
    assert sorted(files_in("out")) == ["dict.txt"]


def test_a_ready_dictionary_is_taken_as_it_is(text):
    (text / "ready.txt").write_text("sat 9\nthe 1\ndog 4\n")
    preprocess(
        "--only-source", "--trainpref", "train", "--validpref", "valid", "--srcdict", "ready.txt", "--destdir", "o"
    )
    assert (text / "o/dict.txt").read_bytes() == (text / "ready.txt").read_bytes()
    assert strings("o", "valid") == ["the dog sat"]


def test_several_texts_of_a_split(text):
    preprocess("--only-source", "--trainpref", "train,test", "--validpref", "valid,test", "--destdir", "out")
    assert {"train.bin", "train1.bin", "valid.bin", "valid1.bin"} <= set(files_in("out"))
    assert strings("out", "valid1") == strings("out", "train1") == ["cat"]
    assert Dictionary.load("out/dict.txt").counts[5] == 2  # cat: both training texts are counted


def test_the_number_of_processes_changes_nothing(text):
    words = np.random.default_rng(1).zipf(1.3, 400_000) % 9973
    (text / "long").write_text("".join(f"word{w}{' ' if w % 11 else chr(10)}" for w in words.tolist()) * 6)
    assert os.path.getsize("long") > CHUNK_BYTES  # there is work for two
    for workers in (1, 2):
        preprocess("--only-source", "--trainpref", "long", "--destdir", f"w{workers}", "--workers", workers)
    assert files_in("w1") == files_in("w2")


def test_two_languages(text):
    pair = ("-s", "de", "-t", "en", "--trainpref", "train", "--validpref", "valid")
    preprocess(*pair, "--destdir", "out", "--thresholdtgt", 2)
    assert sorted(files_in("out")) == sorted(
        ["dict.de.txt", "dict.en.txt"]
        + [
            f"{split}.de-en.{lang}.{e}"
            for split in ("train", "valid")
            for lang in ("de", "en")
            for e in ("bin", "idx", "sums.json")
        ]
    )
    assert strings("out", "train.de-en.de", "dict.de.txt") == ["das Haus ist gross"]
    assert strings("out", "train.de-en.en", "dict.en.txt") == ["<unk> <unk> <unk> big big"]


def test_two_languages_share_a_dictionary(text):
    pair = ("-s", "de", "-t", "en", "--trainpref", "train")
    preprocess(*pair, "--destdir", "out", "--joined-dictionary")
    both = (text / "out/dict.de.txt").read_bytes()
    assert both == (text / "out/dict.en.txt").read_bytes()
    counts = Counter(["das", "Haus", "ist", "gross", "the", "house", "is", "big", "big"])
    assert both == Dictionary.from_counts(counts).to_bytes()
    preprocess(*pair, "--destdir", "again", "--joined-dictionary", "--tgtdict", "out/dict.en.txt")
    assert files_in("again") == files_in("out")


def test_a_ready_dictionary_for_one_language(text):
    (text / "ready.txt").write_text("big 1\n")
    preprocess("-s", "de", "-t", "en", "--trainpref", "train", "--tgtdict", "ready.txt", "--destdir", "out")
    assert strings("out", "train.de-en.en", "dict.en.txt") == ["<unk> <unk> <unk> big big"]
    assert strings("out", "train.de-en.de", "dict.de.txt") == ["das Haus ist gross"]


def test_one_language_of_a_pair_keeps_fairseqs_names(text):
    preprocess("--only-source", "-s", "de", "--trainpref", "train", "--destdir", "out")
    text = [f"train.de-None.de.{end}" for end in ("bin", "idx", "sums.json")]
    assert sorted(files_in("out")) == ["dict.de.txt", *text]


def test_a_second_run_may_follow_but_not_change_the_dictionary(text):
    words = ("--only-source", "--trainpref", "train", "--destdir", "out")
    preprocess(*words)
    before = files_in("out")
    preprocess(*words)
    assert files_in("out") == before
    with pytest.raises(
        ValueError, match="out/dict.txt is there already and holds other symbols; keep it with --srcdict"
    ):
        preprocess(*words, "--nwordssrc", 5)
    assert files_in("out") == before
    preprocess("--only-source", "--testpref", "test", "--srcdict", "out/dict.txt", "--destdir", "out")
    assert strings("out", "test") == ["cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only-source",), "give --trainpref TEXT to make the dictionary from"),
        (("--trainpref", "train"), "give --source-lang and --target-lang, or --only-source"),
        (("--trainpref", "train", "-s", "de", "-t", "de"), "both 'de'"),
        (("-s", "de", "-t", "en", "--srcdict", "valid"), "give --trainpref"),
        (("--only-source", "--trainpref", "train", "--validpref", "gone"), "no such text file: gone"),
        (("--only-source", "--trainpref", "train", "--srcdict", "gone"), "no such text file: gone"),
        (("--only-source", "--trainpref", "train", "--srcdict", "valid"), "valid, line 1: expected 'symbol count'"),
        (("--only-source", "--trainpref", "train", "--workers", "0"), "--workers must be at least 1, got 0"),
        (("--only-source", "--trainpref", "train", "--padding-factor", "0"), "--padding-factor must be at least 1"),
        (
            ("-s", "de", "-t", "en", "--joined-dictionary", "--srcdict", "a", "--tgtdict", "b"),
            "--joined-dictionary takes one of",
        ),
    ],
)
def test_mistakes_are_told_before_any_work(text, words, message):
    with pytest.raises(ValueError, match=message):
        preprocess(*words)
    assert not os.path.exists("data-bin") or os.listdir("data-bin") == []


def test_a_destination_that_cannot_be_written(text):
    (text / "out").write_text("a file")
    with pytest.raises(ValueError, match="--destdir out cannot be written: File exists"):
        preprocess("--only-source", "--trainpref", "train", "--destdir", "out")


def test_flags_of_the_original_that_set_nothing_are_accepted_with_a_warning(text, caplog):
    words = [word for name, (takes_value, _) in IGNORED.items() for word in (name, *["1"] * takes_value)]
    preprocess("--only-source", "--trainpref", "train", *words)
    for name in IGNORED:
        assert f"{name} is ignored: " in caplog.text
    assert not set(IGNORED) & {name for field in dataclasses.fields(PreprocessConfig) for name in flag_names(field)}


def test_older_formats_are_written_as_mmap(text, caplog):
    preprocess("--only-source", "--trainpref", "train", "--dataset-impl", "lazy")
    assert "--dataset-impl lazy is written as mmap" in caplog.text
    assert len(MMapIndexedDataset("data-bin/train")) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only_source", "--trainpref", "gone"], "preprocess.py: error: no such text file: gone\n"),
        (["--only-sorce"], "preprocess.py: error: unknown flag --only-sorce (did you mean '--only-source'?)\n"),
    ],
)
def test_the_command_tells_a_mistake_in_one_line(text, words, message):
    command = [sys.executable, "-c", "from fairseq_cli.preprocess import cli_main; cli_main()", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


@pytest.mark.parametrize(
    ("reference", "texts", "lines"),
    [
        ("trime/data-bin/wt2s", "trime/corpus", None),
        ("fairseq012/data-bin/lm", "trime/corpus", {"train": 1500, "valid": 150, "test": 150}),
    ],
)
def test_fairseqs_files_come_out_byte_for_byte(text, reference, texts, lines):
    golden = os.environ.get("FAIRSEQ_GOLDEN")
    if not golden:
        pytest.skip("FAIRSEQ_GOLDEN names no folder with fairseq's files")
    words = ["--only-source", "--destdir", "out", "--workers", "2"]
    for split in ("train", "valid", "test"):
        with open(os.path.join(golden, texts, f"{split}.txt"), encoding="utf-8") as file:
            (text / f"{split}.txt").write_text("".join(file.readlines()[: lines[split] if lines else None]))
        words += [f"--{split}pref", f"{split}.txt"]
    preprocess(*words)
    theirs = files_in(os.path.join(golden, reference))
    ours = files_in("out")
    assert all(theirs[name] == content for name, content in ours.items())
    assert set(theirs) - set(ours) <= {"batches.json"}


def test_fairseqs_files_of_two_languages_come_out_byte_for_byte(text):
    golden = os.environ.get("FAIRSEQ_GOLDEN")
    if not golden:
        pytest.skip("FAIRSEQ_GOLDEN names no folder with fairseq's files")
    reference = os.path.join(golden, "fairseq012/data-bin/mt")
    for split in ("train", "valid", "test"):
        for lang in ("de", "en"):
            lines = strings(reference, f"{split}.de-en.{lang}", f"dict.{lang}.txt")
            (text / f"{split}.{lang}").write_text("".join(line + "\n" for line in lines))
    splits = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", split)]
    preprocess("-s", "de", "-t", "en", *splits, "--destdir", "out")
    assert files_in("out") == files_in(reference)
