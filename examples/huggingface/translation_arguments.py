"""Options of run_translation.py: model, pairs of sentences, memory, and Hugging Face's own Seq2SeqTrainingArguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from script_arguments import KnnArguments, ModelArguments, TextArguments, parse_into, text
from transformers import Seq2SeqTrainingArguments

from fairseq.config import require_at_least


@dataclass(frozen=True)
class TranslationArguments(TextArguments):
    """The sentences, and how they are translated."""

    train_file: str | None = text(
        None,
        "Pairs to train on or to save: a .jsonl file; two parallel files, separated by a comma; or their common prefix "
        "(corpus for corpus.en and corpus.ro).",
    )
    dataset_name: str | None = text(
        None, "Folder with the pairs of each subset (train.jsonl, or train.en and train.ro, ...)."
    )
    source_lang: str | None = text(None, "Source language: key of the data, and the tokenizer's code for it.")
    target_lang: str | None = text(None, "Target language: key of the data, and the tokenizer's code for it.")
    source_prefix: str = text("", "Text before each source, for T5 say 'translate English to Romanian: '.")
    forced_bos_token: str | None = text(
        None, "First token of each translation; by default the target language's, if the tokenizer begins with it."
    )
    max_source_length: int | None = text(None, "Tokens of a source, at most; by default what the model reads, or 1024.")
    max_target_length: int | None = text(None, "Tokens of a target, at most; by default 128.")
    val_max_target_length: int | None = text(None, "Tokens of a translation, at most; by default --max_target_length.")
    num_beams: int | None = text(None, "Beams of the search; by default the model's own number.")
    max_predict_samples: int | None = text(None, "Samples of --do_predict, at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, between="_", max_predict_samples=self.max_predict_samples, num_beams=self.num_beams)
        require_at_least(1, between="_", max_source_length=self.max_source_length)
        require_at_least(2, between="_", max_target_length=self.max_target_length)
        require_at_least(2, between="_", val_max_target_length=self.val_max_target_length)

    def paths(self, given: str) -> tuple[str, ...]:
        """The files that the value of a flag stands for."""
        if Path(given).is_file():
            return (given,)
        two = tuple(given.split(","))
        if len(two) == 2:
            return two
        if self.source_lang and self.target_lang and any(map(Path.is_file, parallel(Path(given), self))):
            return tuple(map(str, parallel(Path(given), self)))
        return (given,)


def languages(data: TranslationArguments) -> tuple[list[str], list[str]]:
    """Names of source and target in the data, the likeliest first: mBART's en_XX is en in most data."""
    return _names(data.source_lang), _names(data.target_lang)


def _names(language: str | None) -> list[str]:
    return [] if language is None else list(dict.fromkeys((language, language.partition("_")[0])))


def parallel(prefix: Path, data: TranslationArguments) -> tuple[Path, Path]:
    """The two files of a prefix, source and target: those that exist, or those of the languages as they were given."""
    source, target = (
        next(filter(Path.is_file, named), named[0])
        for named in ([prefix.with_name(f"{prefix.name}.{name}") for name in names] for names in languages(data))
    )
    return source, target


def parse(
    argv: Sequence[str], program: str = "run_translation.py"
) -> tuple[ModelArguments, TranslationArguments, KnnArguments, Seq2SeqTrainingArguments]:
    """Read a command line, or a .json file that holds the same. Raises: ValueError for a flag that is unknown."""
    kinds = (ModelArguments, TranslationArguments, KnnArguments, Seq2SeqTrainingArguments)
    return parse_into(argv, kinds, program, __doc__)  # type: ignore[return-value]
