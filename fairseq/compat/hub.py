"""``fairseq.hub_utils``: a trained model with its dictionary, tokenizer and word pieces, text in and text out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.checkpoint_utils import load_checkpoint, load_model_for
from fairseq.compat.generation import GenerationConfig, generate
from fairseq.data.dictionary import Dictionary, join_pieces
from fairseq.data.monolingual_dataset import pad_rows
from fairseq.registry import lookup
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.models.transformer_lm import TransformerLanguageModel

Codec = tuple[Callable[[str], str], Callable[[str], str]]


def from_pretrained(
    model_name_or_path: str,
    checkpoint_file: str = "model.pt",
    data_name_or_path: str = ".",
    tokenizer: str | None = None,
    bpe: str | None = None,
    **more: object,
) -> GeneratorHubInterface:
    """Open a trained language model.

    Args:
        model_name_or_path: folder of the checkpoint.
        checkpoint_file: its file; several separated by colons are an ensemble.
        data_name_or_path: folder of ``dict.txt``, within the first one or by itself.
        tokenizer: None or ``moses``.
        bpe: None, ``fastbpe``, ``subword_nmt`` (with ``bpe_codes=FILE``) or ``sentencepiece`` (with
            ``sentencepiece_model=FILE``); files are looked for in the folder first.
        more: those files; settings of the model are overridden by others.
    Raises: ValueError or OSError when something is missing, or does not fit.
    """
    folder = model_name_or_path
    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is no folder; models are not downloaded: give the folder of {checkpoint_file}")
    words: dict[str, Any] = {
        name: more.pop(name) for name in ("bpe_codes", "sentencepiece_model", "moses_source_lang") if name in more
    }
    for name in ("bpe_codes", "sentencepiece_model"):
        if name in words:
            words[name] = _within(folder, words[name])
    split = lookup(_TOKENIZERS, str(tokenizer or "none"), "tokenizer")(words)
    pieces = lookup(_BPES, str(bpe or "none"), "bpe")(words)
    dictionary = Dictionary.load(os.path.join(_within(folder, data_name_or_path), "dict.txt"))
    models = []
    for name in checkpoint_file.split(":"):
        path = os.path.join(folder, name)
        models.append(load_model_for(dictionary, load_checkpoint(path), path, more).eval())
    return GeneratorHubInterface(models, dictionary, split, pieces)


def _within(folder: str, name: str) -> str:
    inside = os.path.join(folder, name)
    return inside if os.path.exists(inside) else name


class GeneratorHubInterface(nn.Module):
    """Language models that sample and score text."""

    def __init__(
        self, models: Sequence[TransformerLanguageModel], dictionary: Dictionary, tokenizer: Codec, bpe: Codec
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.dictionary = dictionary
        self._tokenizer, self._bpe = tokenizer, bpe

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device

    def encode(self, sentence: str) -> Tensor:
        """The numbers of a sentence, int64 (T,), ended by </s>."""
        return self.binarize(self.apply_bpe(self.tokenize(sentence)))

    def decode(self, tokens: Tensor) -> str:
        """The sentence of numbers."""
        return self.detokenize(self.remove_bpe(self.string(tokens)))

    def tokenize(self, sentence: str) -> str:
        """Words separated by spaces."""
        return self._tokenizer[0](sentence)

    def detokenize(self, sentence: str) -> str:
        """The text of words."""
        return self._tokenizer[1](sentence)

    def apply_bpe(self, sentence: str) -> str:
        """Word pieces separated by spaces."""
        return self._bpe[0](sentence)

    def remove_bpe(self, sentence: str) -> str:
        """The words of pieces."""
        return self._bpe[1](sentence)

    def binarize(self, sentence: str) -> Tensor:
        """The numbers of words or pieces, ended by </s>."""
        return self.dictionary.encode_line(sentence, add_if_not_exist=False).long()

    def string(self, tokens: Tensor) -> str:
        """The words or pieces of numbers, without <s> and </s>."""
        return self.dictionary.string(tokens.cpu())

    def sample(self, sentences: Any, beam: int = 1, verbose: bool = False, **more: object) -> Any:
        """Continue a sentence, or each of a list; settings are those of ``GenerationConfig``."""
        if not isinstance(sentences, str):
            return [self.sample(sentence, beam, verbose, **more) for sentence in sentences]
        return self.decode(self.generate(self.encode(sentences), beam, **more)[0]["tokens"])

    def generate(self, tokens: Tensor, beam: int = 5, **more: Any) -> list[dict[str, Any]]:
        """The best continuations of numbers: ``tokens``, ``score`` and ``positional_scores`` of each.

        Raises: TypeError for a setting that ``GenerationConfig`` has not.
        """
        config = GenerationConfig(**({"beam": beam, "nbest": beam} | more))
        prefix = tokens[:-1] if len(tokens) and tokens[-1] == self.dictionary.eos() else tokens
        models: Any = self.models
        found = generate(list(models), prefix.to(self.device), self.dictionary, config)
        return [{"tokens": h.tokens, "score": h.score, "positional_scores": h.logp} for h in found]

    def score(self, sentences: Any, **more: object) -> Any:
        """Log-probability of each number of a sentence, </s> included, as ``positional_scores``, and their mean."""
        if not isinstance(sentences, str):
            return [self.score(sentence) for sentence in sentences]
        tokens = self.encode(sentences)
        target = tokens.numpy()
        source = torch.cat([tokens[-1:], tokens[:-1]]).numpy()
        batch = pad_rows(torch.zeros(1).long().numpy(), [(target[:0], source, target)], self.dictionary.pad())
        models: Any = self.models
        logp = SequenceScorer(list(models), device=self.device).score(batch).logp_N
        return {"tokens": tokens, "score": float(logp.mean()), "positional_scores": logp}


def _package(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ValueError(f"{option} needs the package {package}, which is not installed: pip install it") from error


def _file(words: dict[str, Any], name: str, option: str) -> str:
    if name not in words:
        raise ValueError(f"{option} needs {name}=FILE; give it")
    return str(words[name])


def _as_it_is(words: dict[str, Any]) -> Codec:
    return (lambda text: text), (lambda text: text)


def _moses(words: dict[str, Any]) -> Codec:
    moses, lang = _package("sacremoses", "tokenizer moses"), words.get("moses_source_lang", "en")
    split, join = moses.MosesTokenizer(lang), moses.MosesDetokenizer(lang)
    return (lambda text: str(split.tokenize(text, return_str=True))), (lambda text: str(join.detokenize(text.split())))


def _subword_nmt(words: dict[str, Any]) -> Codec:
    with open(_file(words, "bpe_codes", "bpe"), encoding="utf-8") as codes:
        pieces = _package("subword_nmt.apply_bpe", "bpe").BPE(codes)
    return (lambda text: str(pieces.process_line(text))), (lambda text: join_pieces(text, "@@ "))


def _sentencepiece(words: dict[str, Any]) -> Codec:
    path = _file(words, "sentencepiece_model", "bpe sentencepiece")
    model = _package("sentencepiece", "bpe sentencepiece").SentencePieceProcessor(model_file=path)
    return (lambda text: " ".join(model.encode(text, out_type=str))), (lambda text: join_pieces(text, "sentencepiece"))


_TOKENIZERS: dict[str, Callable[[dict[str, Any]], Codec]] = {"none": _as_it_is, "space": _as_it_is, "moses": _moses}
_BPES: dict[str, Callable[[dict[str, Any]], Codec]] = {
    "none": _as_it_is,
    "fastbpe": _subword_nmt,
    "subword_nmt": _subword_nmt,
    "sentencepiece": _sentencepiece,
}
