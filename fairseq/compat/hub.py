"""``fairseq.hub_utils``: a trained model with its dictionaries, tokenizer and word pieces, text in and text out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, load_model_for
from fairseq.config import in_python
from fairseq.data.codecs import CodecConfig, TextCodec
from fairseq.data.dictionary import Dictionary
from fairseq.data.language_pair_dataset import pad_sentences
from fairseq.data.monolingual_dataset import pad_rows
from fairseq.generation.config import GenerationConfig
from fairseq.generation.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.models.transformer_lm import TransformerLanguageModel


def from_pretrained(
    model_name_or_path: str,
    checkpoint_file: str = "model.pt",
    data_name_or_path: str = ".",
    tokenizer: str | None = None,
    bpe: str | None = None,
    **more: object,
) -> GeneratorHubInterface:
    """Open a trained language model or translation model.

    Args:
        model_name_or_path: folder of the checkpoint.
        checkpoint_file: its file; several separated by colons are an ensemble.
        data_name_or_path: folder of ``dict.txt`` (of ``dict.LANG.txt``), within the first one or by itself.
        tokenizer: None, ``moses``, ``nltk`` or ``space``.
        bpe: None, ``fastbpe``, ``subword_nmt`` (with ``bpe_codes=FILE``), ``sentencepiece`` (with
            ``sentencepiece_model=FILE``) or ``gpt2``; files are looked for in the folder first.
        more: those files, ``source_lang``, ``target_lang``; settings of the model are overridden by others.
    Raises: ValueError or OSError when something is missing, or does not fit.
    """
    folder = model_name_or_path
    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is no folder; models are not downloaded: give the folder of {checkpoint_file}")
    paths = [os.path.join(folder, name) for name in checkpoint_file.split(":")]
    checkpoints = [load_checkpoint(path) for path in paths]
    names = {field.name for field in fields(CodecConfig)}
    words: dict[str, Any] = {name: more.pop(name) for name in sorted(names & more.keys())}
    words = {name: _within(folder, value) if name in _FILES else value for name, value in words.items()}
    words = _languages(checkpoints[0]) | words | {"tokenizer": tokenizer, "bpe": bpe}
    try:
        codec = TextCodec.of(CodecConfig(**words))
    except ValueError as error:  # it speaks of flags
        raise ValueError(in_python(str(error))) from error
    data = _within(folder, data_name_or_path)
    source, dictionary = _dictionaries(data, words)
    models = [load_model_for(dictionary, c, path, more, source).eval() for c, path in zip(checkpoints, paths)]
    return GeneratorHubInterface(models, dictionary, codec, source)


_FILES = ("bpe_codes", "sentencepiece_model", "gpt2_encoder_json", "gpt2_vocab_bpe")


def _languages(checkpoint: Checkpoint) -> dict[str, Any]:
    """Source and target language of a translation model; nothing of a language model."""
    task: Mapping[str, Any] = checkpoint.config.get("task", {})
    if task.get("name") != "translation":
        return {}
    return {name: task.get(name) for name in ("source_lang", "target_lang")}


def _dictionaries(folder: str, words: Mapping[str, Any]) -> tuple[Dictionary | None, Dictionary]:
    if not words.get("target_lang"):
        return None, Dictionary.load(os.path.join(folder, "dict.txt"))
    paths = (os.path.join(folder, f"dict.{words[name]}.txt") for name in ("source_lang", "target_lang"))
    source, target = (Dictionary.load(path) for path in paths)
    return source, target


def _within(folder: str, name: str) -> str:
    inside = os.path.join(folder, name)
    return inside if os.path.exists(inside) else name


class GeneratorHubInterface(nn.Module):
    """Models that translate, or continue, and score text."""

    def __init__(
        self,
        models: Sequence[TransformerLanguageModel],
        dictionary: Dictionary,
        codec: TextCodec,
        source: Dictionary | None = None,
    ) -> None:
        """Args.

        dictionary: of what the models write.
        source: of what translation models read.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        self.dictionary = dictionary
        self.source = source
        self._codec = codec

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device

    def encode(self, sentence: str) -> Tensor:
        """The numbers of a sentence that the models read, int64 (T,), ended by </s>."""
        return self.binarize(self.apply_bpe(self.tokenize(sentence)))

    def decode(self, tokens: Tensor) -> str:
        """The sentence of numbers that the models wrote."""
        return self.detokenize(self.remove_bpe(self.string(tokens)))

    def tokenize(self, sentence: str) -> str:
        """Words separated by spaces."""
        return self._codec.tokenizer.encode(sentence)

    def detokenize(self, sentence: str) -> str:
        """The text of words."""
        return self._codec.tokenizer.decode(sentence)

    def apply_bpe(self, sentence: str) -> str:
        """Word pieces separated by spaces."""
        return self._codec.pieces.encode(sentence)

    def remove_bpe(self, sentence: str) -> str:
        """The words of pieces."""
        return self._codec.pieces.decode(sentence)

    def binarize(self, sentence: str) -> Tensor:
        """The numbers of words or pieces that the models read, ended by </s>."""
        return (self.source or self.dictionary).encode_line(sentence, add_if_not_exist=False).long()

    def string(self, tokens: Tensor) -> str:
        """The words or pieces of numbers that the models wrote, without <s> and </s>."""
        return self.dictionary.string(tokens.cpu())

    def translate(self, sentences: Any, beam: int = 5, verbose: bool = False, **more: object) -> Any:
        """Translate a sentence, or each of a list; settings are those of ``GenerationConfig``."""
        return self.sample(sentences, beam, verbose, **more)

    def sample(self, sentences: Any, beam: int = 1, verbose: bool = False, **more: object) -> Any:
        """Continue, or translate, a sentence or each of a list; settings are those of ``GenerationConfig``."""
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, **more)[0]
        found = self.generate([self.encode(sentence) for sentence in sentences], beam, **more)
        return [self.decode(hypotheses[0]["tokens"]) for hypotheses in found]

    def generate(self, tokens: Any, beam: int = 5, **more: Any) -> Any:
        """The best texts for numbers, or for each of a list: ``tokens``, ``score`` and ``positional_scores`` of each.

        A language model's texts begin with what it was given.

        Raises: TypeError for a setting that ``GenerationConfig`` has not.
        """
        if isinstance(tokens, Tensor):
            return self.generate([tokens], beam, **more)[0]
        if "temperature" in more:
            more["logit_temperature"] = more.pop("temperature")
        config = GenerationConfig(**({"beam": beam, "nbest": beam} | more))
        models: Any = self.models
        generator = SequenceGenerator(list(models), self.dictionary, config)
        found = [self._generated(generator, text.cpu()) for text in tokens] if self.source is None else []
        if self.source is not None and tokens:
            source = pad_sentences([text.cpu().numpy() for text in tokens], self.source.pad(), left=True)
            found = generator.generate({"source_BS": source.to(self.device)}, [len(text) for text in tokens])
        return [
            [{"tokens": h.tokens, "score": h.score, "positional_scores": h.logp} for h in hypotheses]
            for hypotheses in found
        ]

    def _generated(self, generator: SequenceGenerator, text: Tensor) -> Any:
        """Continuations of one text."""
        prefix = text[:-1] if len(text) and text[-1] == self.dictionary.eos() else text
        return generator.generate({}, [len(prefix) + 1], prefix[None])[0]

    def score(self, sentences: Any, **more: object) -> Any:
        """Log-probability of each number of a sentence, </s> included, as ``positional_scores``, and their mean.

        Raises: ValueError for a translation model, whose score is that of a pair: ``generate.py --score-reference``.
        """
        if self.source is not None:
            raise ValueError("a translation is scored with its source: generate.py --score-reference does")
        if not isinstance(sentences, str):
            return [self.score(sentence) for sentence in sentences]
        tokens = self.encode(sentences)
        target = tokens.numpy()
        source = torch.cat([tokens[-1:], tokens[:-1]]).numpy()
        batch = pad_rows(torch.zeros(1).long().numpy(), [(target[:0], source, target)], self.dictionary.pad())
        models: Any = self.models
        logp = SequenceScorer(list(models), device=self.device).score(batch).logp_N
        return {"tokens": tokens, "score": float(logp.mean()), "positional_scores": logp}
