"""Text to words and word pieces and back: ``--tokenizer`` and ``--bpe`` by name, each by its well-known library."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.config import flag
from fairseq.data.dictionary import join_pieces
from fairseq.registry import lookup


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Options of tokenizer and word pieces."""

    tokenizer: str | None = flag("--tokenizer", default=None)
    """Splits text into words and joins them again: moses (sacremoses), nltk or space."""
    bpe: str | None = flag("--bpe", default=None)
    """Cuts words into pieces and joins them again: subword_nmt, fastbpe, sentencepiece or gpt2."""
    source_lang: str | None = flag("--source-lang", "-s", default=None)
    """Language of the text that is read."""
    target_lang: str | None = flag("--target-lang", "-t", default=None)
    """Language of the text that is written."""
    moses_source_lang: str | None = flag("--moses-source-lang", default=None)
    """Language for --tokenizer moses to split; by default --source-lang."""
    moses_target_lang: str | None = flag("--moses-target-lang", default=None)
    """Language for --tokenizer moses to join; by default --target-lang."""
    moses_no_dash_splits: bool = flag("--moses-no-dash-splits", default=False)
    """Leave words with dashes whole."""
    moses_no_escape: bool = flag("--moses-no-escape", default=False)
    """Do not write &, < and others as XML entities."""
    bpe_codes: str | None = flag("--bpe-codes", default=None)
    """File of subword-nmt's (or fastBPE's) codes."""
    bpe_separator: str = flag("--bpe-separator", default="@@")
    """Mark at the end of a piece that the next one continues."""
    sentencepiece_model: str | None = flag("--sentencepiece-model", default=None)
    """File of a sentencepiece model."""
    gpt2_encoder_json: str | None = flag("--gpt2-encoder-json", default=None)
    """GPT-2's vocabulary, encoder.json."""
    gpt2_vocab_bpe: str | None = flag("--gpt2-vocab-bpe", default=None)
    """GPT-2's merges, vocab.bpe."""

    def __post_init__(self) -> None:
        for option, name, table in (("--tokenizer", self.tokenizer, TOKENIZERS), ("--bpe", self.bpe, WORD_PIECES)):
            if name is not None:
                lookup(table, name, option)
        files = {
            "subword_nmt": ("bpe_codes",),
            "fastbpe": ("bpe_codes",),
            "sentencepiece": ("sentencepiece_model",),
            "gpt2": ("gpt2_encoder_json", "gpt2_vocab_bpe"),
        }
        for name in files.get(self.bpe or "", ()):
            option, path = "--" + name.replace("_", "-"), getattr(self, name)
            if path is None:
                raise ValueError(f"--bpe {self.bpe} needs {option} FILE; give it")
            if not os.path.isfile(path):
                raise ValueError(f"{option}: no such file: {path}")


@dataclass(frozen=True)
class Codec:
    """A way to cut text, and to join what was cut."""

    encode: Callable[[str], str]
    decode: Callable[[str], str]


def _same(text: str) -> str:
    return text


AS_IT_IS = Codec(_same, _same)


@dataclass(frozen=True)
class TextCodec:
    """Tokenizer and word pieces, one after the other."""

    tokenizer: Codec = AS_IT_IS
    pieces: Codec = AS_IT_IS

    @classmethod
    def of(cls, config: CodecConfig) -> TextCodec:
        """The codec that a config names. Raises: ValueError when its library is not installed."""
        names = ((config.tokenizer, TOKENIZERS), (config.bpe, WORD_PIECES))
        return cls(*(AS_IT_IS if name is None else table[name](config) for name, table in names))

    def encode(self, text: str) -> str:
        """Text to pieces, separated by blanks."""
        return self.pieces.encode(self.tokenizer.encode(text))

    def decode(self, pieces: str) -> str:
        """Pieces to text."""
        return self.tokenizer.decode(self.pieces.decode(pieces))


def package(name: str, option: str) -> Any:
    """A module of a codec's library. Raises: ValueError that names the option (or task) and what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ValueError(f"{option} needs the package {package}, which is not installed: pip install it") from error


def _moses(config: CodecConfig) -> Codec:
    moses = package("sacremoses", "--tokenizer moses")
    source = config.moses_source_lang or config.source_lang or "en"
    target = config.moses_target_lang or config.target_lang or source
    split, join = moses.MosesTokenizer(source), moses.MosesDetokenizer(target)

    def encode(text: str) -> str:
        found: str = split.tokenize(
            text,
            aggressive_dash_splits=not config.moses_no_dash_splits,
            return_str=True,
            escape=not config.moses_no_escape,
        )
        return found

    return Codec(encode, lambda text: str(join.detokenize(text.split())))


def _nltk(config: CodecConfig) -> Codec:
    words = package("nltk.tokenize", "--tokenizer nltk")
    split, join = words.NLTKWordTokenizer(), words.treebank.TreebankWordDetokenizer()
    return Codec(lambda text: " ".join(split.tokenize(text)), lambda text: str(join.detokenize(text.split())))


def _space(config: CodecConfig) -> Codec:
    return Codec(lambda text: " ".join(text.split()), _same)


def _subword_nmt(config: CodecConfig) -> Codec:
    mark = config.bpe_separator
    with open(str(config.bpe_codes), encoding="utf-8") as codes:
        pieces = package("subword_nmt.apply_bpe", f"--bpe {config.bpe}").BPE(codes, separator=mark)
    return Codec(lambda text: str(pieces.process_line(text)), lambda text: join_pieces(text, f"{mark} "))


def _sentencepiece(config: CodecConfig) -> Codec:
    library = package("sentencepiece", "--bpe sentencepiece")
    model = library.SentencePieceProcessor(model_file=config.sentencepiece_model)
    return Codec(
        lambda text: " ".join(model.encode(text, out_type=str)), lambda text: join_pieces(text, "sentencepiece")
    )


def _gpt2(config: CodecConfig) -> Codec:
    """fairseq writes GPT-2's pieces as their numbers."""
    library = package("tokenizers", "--bpe gpt2")
    model = library.models.BPE.from_file(config.gpt2_encoder_json, config.gpt2_vocab_bpe)
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()

    def decode(text: str) -> str:
        numbers = [int(word) for word in text.split() if word.isdecimal()]
        return str(tokenizer.decode(numbers))

    return Codec(lambda text: " ".join(map(str, tokenizer.encode(text).ids)), decode)


TOKENIZERS: Mapping[str, Callable[[CodecConfig], Codec]] = {"moses": _moses, "nltk": _nltk, "space": _space}
WORD_PIECES: Mapping[str, Callable[[CodecConfig], Codec]] = {
    "fastbpe": _subword_nmt,
    "gpt2": _gpt2,
    "sentencepiece": _sentencepiece,
    "subword_nmt": _subword_nmt,
}
