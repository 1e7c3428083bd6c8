"""``preprocess.py``: text to dictionaries and binarised data, for language models and for translation."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq.config import FlagParser, build, flag, ignored_flags, require_at_least
from fairseq.data.binarizer import binarize, count_symbols
from fairseq.data.dictionary import Dictionary
from fairseq.runtime.files import locked
from fairseq_cli.entry import run

logger = logging.getLogger(__name__)

NUM_SPECIAL = Dictionary().nspecial

IGNORED: dict[str, tuple[int, str]] = ignored_flags.PREPROCESS | {
    "--no-progress-bar": (0, "there is no bar"),
    "--log-interval": (1, "each file is reported once"),
    "--log-format": (1, "each file is reported once"),
    "--tensorboard-logdir": (1, "there is nothing to plot"),
    "--user-dir": (1, "no plug-in takes part in preprocessing"),
}


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Options of binarising: texts, dictionaries and destination."""

    source_lang: str | None = flag("--source-lang", "-s", default=None)
    """Source language: the text is read from PREFIX.LANG."""
    target_lang: str | None = flag("--target-lang", "-t", default=None)
    """Target language; language models have none."""
    only_source: bool = flag("--only-source", default=False)
    """There is one text, as for a language model; without --source-lang it is read from PREFIX itself."""
    trainpref: str | None = flag("--trainpref", default=None)
    """Training text, or several separated by commas (train, train1, ...); dictionaries are made from it."""
    validpref: str | None = flag("--validpref", default=None)
    """Validation text, or several separated by commas (valid, valid1, ...)."""
    testpref: str | None = flag("--testpref", default=None)
    """Test text, or several separated by commas (test, test1, ...)."""
    destdir: str = flag("--destdir", default="data-bin")
    """Folder for the result."""
    srcdict: str | None = flag("--srcdict", default=None)
    """Take this dict.txt for the source instead of making one."""
    tgtdict: str | None = flag("--tgtdict", default=None)
    """Take this dict.txt for the target instead of making one."""
    thresholdsrc: int = flag("--thresholdsrc", default=0)
    """Source symbols that occur less often become <unk>."""
    thresholdtgt: int = flag("--thresholdtgt", default=0)
    """Target symbols that occur less often become <unk>."""
    nwordssrc: int = flag("--nwordssrc", default=-1)
    """Size of the source dictionary before padding, the four special symbols included; -1 for no limit."""
    nwordstgt: int = flag("--nwordstgt", default=-1)
    """Size of the target dictionary before padding, the four special symbols included; -1 for no limit."""
    joined_dictionary: bool = flag("--joined-dictionary", default=False)
    """Source and target share a dictionary."""
    padding_factor: int = flag("--padding-factor", default=8)
    """A dictionary's size is padded to a multiple of this."""
    dataset_impl: str = flag("--dataset-impl", default="mmap", choices=("mmap", "cached", "lazy", "raw"))
    """File format; the older ones are written as mmap."""
    dict_only: bool = flag("--dict-only", default=False)
    """Write the dictionaries and no data."""
    workers: int = flag("--workers", default=1)
    """Processes that share the work; the result does not depend on it."""

    def __post_init__(self) -> None:
        require_at_least(1, workers=self.workers)
        require_at_least(1, hint="1 is no padding", padding_factor=self.padding_factor)
        for name, nwords in (("--nwordssrc", self.nwordssrc), ("--nwordstgt", self.nwordstgt)):
            if 0 < nwords <= NUM_SPECIAL:
                raise ValueError(
                    f"{name} {nwords} counts the {NUM_SPECIAL} special symbols and so keeps no word; give at least "
                    f"{NUM_SPECIAL + 1}, or -1 for no limit"
                )
        if not self.only_source:
            if not (self.source_lang and self.target_lang):
                raise ValueError("give --source-lang and --target-lang, or --only-source for the text of one language")
            if self.source_lang == self.target_lang:
                raise ValueError(f"--source-lang and --target-lang are both {self.source_lang!r}; they must differ")
            if self.joined_dictionary and self.srcdict and self.tgtdict:
                raise ValueError("--joined-dictionary takes one of --srcdict and --tgtdict, both are given")
        if not self.trainpref and not all(self.given_dictionaries().values()):
            raise ValueError(
                "give --trainpref TEXT to make the dictionary from, or a ready one with --srcdict/--tgtdict"
            )

    @property
    def langs(self) -> list[str | None]:
        """The languages whose text is read; None stands for text without a language suffix."""
        return [self.source_lang] if self.only_source else [self.source_lang, self.target_lang]

    def given_dictionaries(self) -> dict[str | None, str | None]:
        """Language -> the dictionary the user gave for it, if any."""
        if self.only_source:
            return {self.source_lang: self.srcdict}
        if self.joined_dictionary:
            return dict.fromkeys(self.langs, self.srcdict or self.tgtdict)
        return {self.source_lang: self.srcdict, self.target_lang: self.tgtdict}

    def texts(self, lang: str | None) -> Iterator[tuple[str, str]]:
        """(text file, name of its binarised form) for each split of a language."""
        pair = f".{self.source_lang}-{self.target_lang}"
        for split, prefixes in (("train", self.trainpref), ("valid", self.validpref), ("test", self.testpref)):
            for number, prefix in enumerate(prefixes.split(",") if prefixes else []):
                name = f"{split}{number or ''}"
                yield (f"{prefix}.{lang}", f"{name}{pair}.{lang}") if lang else (prefix, name)

    def dictionary_path(self, lang: str | None) -> str:
        """Path of a language's dictionary."""
        return os.path.join(self.destdir, f"dict.{lang}.txt" if lang else "dict.txt")


def cli_main() -> None:
    """Entry point of ``preprocess.py`` and ``fairseq-preprocess``."""
    run("preprocess.py", main)


def main(argv: Sequence[str]) -> None:
    """Binarise text. Raises: ValueError or OSError on a user's mistake."""
    config = parse(argv)
    _check_files(config)
    with locked(Path(config.destdir) / ".preprocess.lock", f"the data of --destdir {config.destdir!r}"):
        _binarize_all(config)
    logger.info("Wrote preprocessed data to %s", config.destdir)


def _binarize_all(config: PreprocessConfig) -> None:
    """Write the dictionaries and the data of all splits."""
    dictionaries = _dictionaries(config)
    for lang, dictionary in dictionaries.items():
        _save_dictionary(dictionary, config.dictionary_path(lang))
    for lang, dictionary in dictionaries.items():
        logger.info("[%s] Dictionary: %d types", lang, len(dictionary))
        for path, name in () if config.dict_only else config.texts(lang):
            report = binarize(path, dictionary, os.path.join(config.destdir, name), config.workers)
            logger.info(
                "[%s] %s: %d sents, %d tokens, %s%% replaced by %s",
                lang,
                path,
                report.num_sentences,
                report.num_tokens,
                format(100 * report.num_replaced / max(1, report.num_tokens), ".3"),
                dictionary[dictionary.unk()],
            )
            if report.num_padding:
                logger.warning(
                    "%s holds %s %d times: it is the padding symbol, read as zeros; spell it otherwise if it is a word",
                    path,
                    dictionary[dictionary.pad()],
                    report.num_padding,
                )


def parse(argv: Sequence[str]) -> PreprocessConfig:
    """Parse the arguments. Exits with status 2 and one line on a mistake."""
    parser = FlagParser("preprocess.py", "Turn text into dictionaries and binarised data.")
    parser.add_config(PreprocessConfig)
    for name, (takes_value, _) in IGNORED.items():
        parser.add_ignored(name, takes_value=bool(takes_value))
    given = parser.parse(argv, ignored_flags.REJECTED_PREPROCESS)
    for name in parser.pop_ignored(given):
        logger.warning("%s is ignored: %s", name, IGNORED[name][1])
    config = build(PreprocessConfig, given)
    if config.dataset_impl != "mmap":
        logger.warning("--dataset-impl %s is written as mmap, which fairseq reads too", config.dataset_impl)
    return config


def _check_files(config: PreprocessConfig) -> None:
    """See that every file can be read and the folder written, before any work."""
    texts = [path for lang in config.langs for path, _ in config.texts(lang)]
    for path in (*texts, *filter(None, config.given_dictionaries().values())):
        if not os.path.isfile(path):
            raise ValueError(f"no such text file: {path}")
        with open(path, "rb"):
            pass
    if not config.only_source:
        _check_pairs(config)
    try:
        os.makedirs(config.destdir, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.destdir):
            pass
    except OSError as error:
        raise ValueError(
            f"--destdir {config.destdir} cannot be written: {error.strerror}; choose another folder"
        ) from error


def _check_pairs(config: PreprocessConfig) -> None:
    """Raise ValueError for texts that are no translations of each other, line by line."""
    for (source, _), (target, _) in zip(*(config.texts(lang) for lang in config.langs)):
        counts = [_num_lines(path) for path in (source, target)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{source} has {counts[0]} lines, {target} has {counts[1]}; each line must be the translation of the "
                "other file's line"
            )


def _num_lines(path: str) -> int:
    """Lines of a text; the last one may lack its line feed."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def _dictionaries(config: PreprocessConfig) -> dict[str | None, Dictionary]:
    """Each language's dictionary, loaded or made from the training text."""
    limits = [(config.thresholdsrc, config.nwordssrc), (config.thresholdtgt, config.nwordstgt)]
    if config.joined_dictionary:
        path = next(iter(config.given_dictionaries().values()))
        joined = Dictionary.load(path) if path else _make_dictionary(config, config.langs, *limits[0])
        return dict.fromkeys(config.langs, joined)
    return {
        lang: Dictionary.load(path) if path else _make_dictionary(config, [lang], *limit)
        for (lang, path), limit in zip(config.given_dictionaries().items(), limits)
    }


def _make_dictionary(config: PreprocessConfig, langs: Sequence[str | None], threshold: int, nwords: int) -> Dictionary:
    texts = [path for lang in langs for path, name in config.texts(lang) if name.startswith("train")]
    counts = count_symbols(texts, config.workers)
    if not counts:
        raise ValueError(f"{', '.join(texts)}: no words, so no dictionary can be made; check --trainpref")
    return Dictionary.from_counts(counts, threshold=threshold, nwords=nwords, padding_factor=config.padding_factor)


def _save_dictionary(dictionary: Dictionary, path: str) -> None:
    """Write a dictionary; an equal one may be there. Raises: ValueError when another is: its data would turn wrong."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() == dictionary.to_bytes():
                return
        raise ValueError(
            f"{path} is there already and holds other symbols; keep it with --srcdict {path} (--tgtdict for a target "
            "language), or choose another --destdir, or remove the folder"
        )
    dictionary.save(path)
