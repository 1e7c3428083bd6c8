"""Translations by beam search, and the tokens that tell a model its languages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, Seq2SeqTrainingArguments
from translation_arguments import TranslationArguments
from translation_data import Lengths

from fairseq.hf.knn.batches import SentencePair
from fairseq.hf.knn.generation import generate_texts


@dataclass(frozen=True)
class Translations:
    """Texts in the order of their sources."""

    texts: list[str]
    seconds: float


def set_languages(tokenizer: Any, data: TranslationArguments) -> dict[str, int]:
    """Give a multilingual tokenizer its languages; returns the arguments of ``generate`` that follow.

    A tokenizer whose targets begin with the language's token (mBART-50, NLLB, M2M100) has it forced as the first token;
    one whose targets end with it (mBART) starts from it.
    Raises: ValueError when a language is missing or unknown to the tokenizer.
    """
    if data.forced_bos_token is not None:
        forced = {"forced_bos_token_id": _token_id(tokenizer, data.forced_bos_token, "--forced_bos_token")}
    else:
        forced = {}
    if not hasattr(tokenizer, "src_lang"):
        return forced
    if data.source_lang is None or data.target_lang is None:
        raise ValueError(f"{type(tokenizer).__name__} is multilingual; give --source_lang and --target_lang")
    _token_id(tokenizer, data.source_lang, "--source_lang")
    language = _token_id(tokenizer, data.target_lang, "--target_lang")
    tokenizer.src_lang, tokenizer.tgt_lang = data.source_lang, data.target_lang
    empty = tokenizer(text_target="")["input_ids"]
    if empty and empty[-1] == language:
        return {"decoder_start_token_id": language} | forced
    return {"forced_bos_token_id": language} | forced if empty and empty[0] == language else forced


def _token_id(tokenizer: Any, name: str, flag: str) -> int:
    """The number of a language's token, or of any other. Raises: ValueError when the tokenizer has none."""
    if name in getattr(tokenizer, "lang_code_to_token", {}):  # M2M100 writes en as __en__
        name = tokenizer.lang_code_to_token[name]
    number = tokenizer.convert_tokens_to_ids(name)
    if number is None or (number == tokenizer.unk_token_id and name != tokenizer.unk_token):
        raise ValueError(f"{flag} {name} is no token of {type(tokenizer).__name__}")
    return int(number)


def search_settings(data: TranslationArguments, training: Seq2SeqTrainingArguments, lengths: Lengths) -> dict[str, Any]:
    """Arguments of ``generate``."""
    settings: dict[str, Any] = {"max_length": lengths.translation, "do_sample": False}
    beams = data.num_beams or training.generation_num_beams
    if beams is not None:
        settings["num_beams"] = beams
    given = training.generation_config
    if given is not None:
        is_made = isinstance(given, GenerationConfig)
        settings["generation_config"] = given if is_made else GenerationConfig.from_pretrained(given)
    return settings


def translate(
    model: Any, tokenizer: Any, pairs: Sequence[SentencePair], settings: dict[str, Any], batch_size: int
) -> Translations:
    """Translate the sources of pairs."""
    started = time.perf_counter()
    found = generate_texts(model, tokenizer, [pair.source_T for pair in pairs], settings, batch_size)
    texts = [" ".join(text.split("\n")).strip() for text in found]  # the file of translations has one a line
    return Translations(texts, time.perf_counter() - started)
