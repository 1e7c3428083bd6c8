"""Translations of a validation set during training: --eval-bleu."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fairseq.data.codecs import CodecConfig, TextCodec
from fairseq.generation.config import GenerationConfig
from fairseq.generation.lines import Wording
from fairseq.generation.sequence_generator import SequenceGenerator
from fairseq.metrics.bleu import bleu_counts
from fairseq.registry import did_you_mean

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary

logger = logging.getLogger(__name__)


class ValidationBleu:
    """Translates batches by beam search and counts what BLEU is computed from."""

    def __init__(self, config: Any, dictionary: Dictionary, target_lang: str) -> None:
        """Args.

        config: the translation task's, with its --eval-bleu options.
        Raises: ValueError for a setting that does not exist.
        """
        self.config, self.dictionary = config, dictionary
        self.generation = _generation(config.eval_bleu_args or {})
        detok = {"target_lang": target_lang} | (config.eval_bleu_detok_args or {})
        codec = TextCodec.of(CodecConfig(tokenizer=config.eval_bleu_detok, **detok))
        if config.eval_tokenized_bleu:
            codec = TextCodec()
        self.wording = Wording(None, dictionary, codec, config.eval_bleu_remove_bpe)

    @classmethod
    def of(cls, task: Any) -> ValidationBleu | None:
        """What a task's validations compute; None without --eval-bleu."""
        if not getattr(task.config, "eval_bleu", False):
            return None
        return cls(task.config, task.dictionary, task.target_lang)

    def counts(self, model: Any, batches: Iterable[Any]) -> dict[str, float]:
        """Counts of all batches; the model is in evaluation mode."""
        generator = SequenceGenerator([model], self.dictionary, self.generation)
        device = next(model.parameters()).device
        hypotheses, references = [], []
        for batch in batches:
            here = batch.to(device)
            lengths = (here.source_BS != self.dictionary.pad()).sum(1).tolist()
            for row, found in enumerate(generator.generate(here.source, lengths)):
                target = batch.target_BT[row][batch.scored_BT[row]]
                hypotheses.append(self.wording.codec.decode(self.wording.of_hypothesis(found[0].tokens)))
                references.append(self.wording.of_reference(target))
        if self.config.eval_bleu_print_samples and hypotheses:
            logger.info("example hypothesis: %s", hypotheses[0])
            logger.info("example reference: %s", references[0])
        tokenize = "none" if self.config.eval_tokenized_bleu else "13a"
        return bleu_counts(hypotheses, references, tokenize=tokenize)


def _generation(given: dict[str, Any]) -> GenerationConfig:
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    settings = {("logit_temperature" if name == "temperature" else name): value for name, value in given.items()}
    for name in settings:
        if name not in known:
            raise ValueError(f"--eval-bleu-args: there is no setting {name!r}{did_you_mean(name, known)}")
    return GenerationConfig(**settings)
