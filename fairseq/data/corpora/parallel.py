"""Corpora of sentence pairs: read, tokenised, cleaned, cut into word pieces and written as two files a split."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from fairseq.data.codecs import CodecConfig, TextCodec, package
from fairseq.data.corpora.corpora import SPLITS, Archive, write_lines

logger = logging.getLogger(__name__)

Pairs = Sequence[tuple[str, str]]
"""Sentences with their translations."""

CODES = "code"
"""File of the merges, beside the texts: what --bpe-codes takes."""


@dataclass(frozen=True)
class ParallelCorpus:
    """Source of one corpus, and how its text is prepared."""

    archives: tuple[Archive, ...]
    """Archives that are downloaded."""
    read: Callable[[Sequence[Path]], Mapping[str, Pairs]]
    """Pairs of each split, from the archives in their order."""
    source: str
    """Language that is translated."""
    target: str
    merges: int
    """Merges of byte-pair encoding, learned on both sides of the training text."""
    lowercase_first: bool = False
    """Text becomes lower case before words are split; else after."""
    escape: bool = True
    """&, < and others become XML entities."""
    max_words: int | None = None
    """Training pairs with a longer side are left out."""
    max_ratio: float | None = None
    """Training pairs of which one side has more than this times the words of the other are left out."""

    @property
    def languages(self) -> tuple[str, str]:
        """Source and target."""
        return self.source, self.target


def _multi30k_archives() -> tuple[Archive, ...]:
    digests = {
        "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
        "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
        "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
        "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
        "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
        "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    }
    base = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
    return tuple(Archive(name, digest, (base,)) for name, digest in digests.items())


def read_multi30k(archives: Sequence[Path]) -> dict[str, Pairs]:
    """The pairs of Multi30k's six files. Raises: ValueError when two sides differ in their number of lines."""
    found: dict[str, Pairs] = {}
    for split, source, target in zip(SPLITS, archives[::2], archives[1::2]):
        de, en = (_lines(gzip.decompress(path.read_bytes()).decode("utf-8")) for path in (source, target))
        found[split] = _paired(de, en, f"{source} and {target}")
    return found


def read_iwslt14(archives: Sequence[Path]) -> dict[str, Pairs]:
    """The German-English pairs of IWSLT 2014: every 23rd of the training text is valid, five talks' sets are test.

    Raises: ValueError when the archive lacks a file, or two sides differ in their number of lines.
    """
    with tarfile.open(archives[0]) as packed:
        texts = {Path(member.name).name: member for member in packed.getmembers() if member.isfile()}

        def lines(name: str, parse: Callable[[str], list[str]]) -> list[str]:
            file = packed.extractfile(texts[name]) if name in texts else None
            if file is None:
                raise ValueError(f"{archives[0]} holds no {name}; give the German-English archive of IWSLT 2014")
            return parse(file.read().decode("utf-8"))

        de, en = (lines(f"train.tags.de-en.{language}", _without_tags) for language in ("de", "en"))
        train = _paired(de, en, f"the training texts of {archives[0]}")
        test: list[tuple[str, str]] = []
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            de, en = (lines(f"IWSLT14.{name}.de-en.{language}.xml", _segments) for language in ("de", "en"))
            test += _paired(de, en, f"the sides of {name}")
    return {"train": train, "test": test}


def _paired(source: Sequence[str], target: Sequence[str], what: str) -> list[tuple[str, str]]:
    if len(source) != len(target):
        raise ValueError(f"{what} have {len(source)} and {len(target)} lines; remove them and run the command again")
    return list(zip(source, target))


def _lines(text: str) -> list[str]:
    """Lines that end with a newline and nothing else: sentences hold other separators."""
    return text.removesuffix("\n").split("\n") if text else []


def _without_tags(text: str) -> list[str]:
    """Lines of a talk, and its title and description; addresses, numbers and keywords of talks are no sentences."""
    no_text = ("<url>", "<talkid>", "<keywords>")
    kept = (line for line in _lines(text) if not any(tag in line for tag in no_text))
    return [re.sub(r"</?(title|description)>", "", line) for line in kept]


def _segments(text: str) -> list[str]:
    segments = ElementTree.fromstring(text).iter("seg")
    return [str(segment.text or "").strip().replace("\u2019", "'") for segment in segments]


MULTI30K = ParallelCorpus(
    _multi30k_archives(), read_multi30k, "de", "en", merges=5000, lowercase_first=True, escape=False
)
# No digest is published for this archive; the one of the first download is kept beside it and compared from then on.
IWSLT14 = ParallelCorpus(
    (Archive("de-en.tgz", None, ("http://dl.fbaipublicfiles.com/fairseq/data/iwslt14",)),),
    read_iwslt14,
    "de",
    "en",
    merges=10000,
    max_words=175,
    max_ratio=1.5,
)
_VALID_EVERY = 23  # of IWSLT's training pairs


def is_prepared(corpus: ParallelCorpus, folder: Path) -> bool:
    """Whether a folder holds all that :func:`prepare` writes."""
    return all((folder / f"{split}.{language}").exists() for split in SPLITS for language in corpus.languages)


def prepare(corpus: ParallelCorpus, pairs: Mapping[str, Pairs], folder: Path, codes: Path | None = None) -> None:
    """Write ``SPLIT.LANGUAGE`` files of word pieces, and the merges, which are learned unless given.

    Args:
        pairs: of each split; without "valid" every 23rd of the training pairs goes there.
        codes: file of merges that was learned on another text.
    """
    package("subword_nmt", "cutting words")  # missing, it is told before the minute of splitting words
    words = {split: _words(corpus, some) for split, some in pairs.items()}
    words["train"] = [pair for pair in words["train"] if _fits(corpus, pair)]
    if not corpus.lowercase_first:
        words = {split: [(one.lower(), other.lower()) for one, other in some] for split, some in words.items()}
    if "valid" not in words:
        words["valid"] = words["train"][_VALID_EVERY - 1 :: _VALID_EVERY]
        words["train"] = [pair for i, pair in enumerate(words["train"], 1) if i % _VALID_EVERY]
    merges = _learned(words["train"], corpus.merges) if codes is None else codes.read_text(encoding="utf-8")
    write_lines(folder / CODES, [merges.encode()])
    pieces = TextCodec.of(CodecConfig(bpe="subword_nmt", bpe_codes=str(folder / CODES)))
    for split in SPLITS:
        for side, language in enumerate(corpus.languages):
            lines = (pieces.encode(pair[side]) for pair in words[split])
            write_lines(folder / f"{split}.{language}", (f"{line}\n".encode() for line in lines))
        logger.info("%s: %d pairs of sentences", split, len(words[split]))


def _words(corpus: ParallelCorpus, pairs: Pairs) -> list[tuple[str, str]]:
    rules = CodecConfig(tokenizer="moses", moses_no_dash_splits=True, moses_no_escape=not corpus.escape)
    cut = [TextCodec.of(replace(rules, source_lang=language)).encode for language in corpus.languages]
    lower = str.lower if corpus.lowercase_first else str
    return [(cut[0](lower(source)), cut[1](lower(target))) for source, target in pairs]


def _fits(corpus: ParallelCorpus, pair: tuple[str, str]) -> bool:
    """Whether a training pair is kept: no empty side, and neither too long nor too uneven."""
    fewer, more = sorted(len(side.split()) for side in pair)
    if corpus.max_words is None and corpus.max_ratio is None:
        return True
    return fewer > 0 and more <= (corpus.max_words or more) and more <= fewer * (corpus.max_ratio or more)


def _learned(pairs: Pairs, merges: int) -> str:
    learn = package("subword_nmt.learn_bpe", "learning word pieces")
    out = io.StringIO()
    text: Iterable[str] = (f"{pair[side]}\n" for side in (0, 1) for pair in pairs)
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
        learn.learn_bpe(text, out, merges)
    return out.getvalue()
