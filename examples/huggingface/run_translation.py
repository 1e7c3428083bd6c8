"""Train and evaluate encoder-decoder models of Hugging Face, alone or with a datastore (kNN-MT, RetoMaton).

    python run_translation.py --model_name_or_path MODEL --validation_file valid.jsonl --source_lang en \
        --target_lang ro --do_eval --predict_with_generate --output_dir out

README.md beside this file goes through the steps: train, save a datastore, build its index, cluster it, translate.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import script_memory
import transformers
from script_models import SEQ2SEQ, evaluating, load_config, load_model, load_tokenizer
from script_results import (
    peak_memory,
    perplexity_figures,
    save_scores,
    search_counts,
    search_figures,
    write_results,
    write_run,
)
from script_training import pad_id, train
from transformers import Seq2SeqTrainingArguments, set_seed
from translation_arguments import TranslationArguments, parse
from translation_data import Lengths, TextPair, encode, read_pairs
from translation_search import search_settings, set_languages, translate
from translation_training import PairPadding, Pairs

from fairseq.hf.knn.batches import SentencePair
from fairseq.hf.knn.evaluation import TokenScores, evaluate
from fairseq.metrics.bleu import score_texts
from fairseq.runtime.atomic_files import require_writable, writing
from fairseq_cli.entry import run

logger = logging.getLogger("run_translation")


@dataclass(frozen=True)
class Subset:
    """Sentences that are evaluated or saved."""

    name: str
    texts: list[TextPair]
    pairs: list[SentencePair]


def main(argv: Sequence[str]) -> None:
    """Do what the flags ask for, in the order train, save, index, cluster, evaluate, predict."""
    options = chosen, data, knn, training = parse(argv)
    check_options(data, training, makes_memory=knn.makes_memory)
    script_memory.begin(knn, training)
    set_seed(training.seed)
    config, tokenizer = load_config(chosen, SEQ2SEQ), load_tokenizer(chosen, SEQ2SEQ)
    if not config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} models have no encoder; run_clm.py evaluates them")
    script_memory.check_store(config, knn)
    forced = set_languages(tokenizer, data)
    lengths = Lengths.of(data, training.generation_max_length, config)

    def subset(name: str, most: int | None) -> Subset:
        texts = read_pairs(data, name, most)
        return Subset(name, texts, encode(texts, tokenizer, data.source_prefix, lengths))

    evaluates = training.do_eval or knn.save_knnlm_dstore
    wanted = {"eval": subset(data.eval_subset, data.max_eval_samples)} if evaluates else {}
    wanted |= {"predict": subset("test", data.max_predict_samples)} if training.do_predict else {}
    model = load_model(chosen, config, tokenizer, SEQ2SEQ) if wanted or training.do_train else None
    if training.do_train:
        samples = Pairs(subset("train", data.max_train_samples).pairs)
        validation = Pairs(subset("validation", None).pairs) if training.eval_strategy != "no" else None
        train(model, tokenizer, training, samples, validation, PairPadding(pad_id(tokenizer)))
    if training.process_index != 0:  # under torchrun, the others have done their part
        return
    script_memory.make(model, config, tokenizer, wanted["eval"].pairs if evaluates else (), knn, training)
    if knn.save_knnlm_dstore:
        wanted.pop("eval")
    if not wanted:
        return
    settings = search_settings(data, training, lengths) | forced
    memory = script_memory.wrapper(knn, tokenizer)
    with evaluating(model, training), memory(model) if memory else contextlib.nullcontext():
        for name, each in wanted.items():
            told, scores = reference_figures(model, each, memory, training)
            if training.predict_with_generate:
                prefix = "" if each is list(wanted.values())[-1] else f"{name}_"
                told |= translation_figures(model, tokenizer, each, memory, settings, training, prefix)
            told |= peak_memory()
            if data.save_scores and each is next(iter(wanted.values())):
                save_scores(data.save_scores, scores)
            write_results(name, told, training)
            write_run(name, "run_translation.py", argv, options, told)


def check_options(data: TranslationArguments, training: Seq2SeqTrainingArguments, *, makes_memory: bool) -> None:
    """Raise ValueError when there is nothing to do, or a file is missing or cannot be written."""
    if not (training.do_train or training.do_eval or training.do_predict or makes_memory):
        raise ValueError(
            "nothing to do: give --do_train, --do_eval, --do_predict, --save_knnlm_dstore, --build_index, "
            "--cluster_dstore"
        )
    data.check_files()
    if data.save_scores:
        require_writable(os.path.dirname(os.path.abspath(data.save_scores)), "--save_scores")
    require_writable(str(training.output_dir), "--output_dir")


def reference_figures(
    model: Any, subset: Subset, memory: Any, training: Seq2SeqTrainingArguments
) -> tuple[dict[str, Any], TokenScores]:
    """Score the references: print and return the figures of their perplexity."""
    scores = evaluate(model, subset.pairs, memory, batch_size=training.per_device_eval_batch_size)
    told = perplexity_figures(scores, sum(len(pair.target_T) for pair in subset.pairs), memory)
    return told | search_figures(memory) | {"subset": subset.name}, scores


def translation_figures(
    model: Any,
    tokenizer: Any,
    subset: Subset,
    memory: Any,
    settings: dict[str, Any],
    training: Seq2SeqTrainingArguments,
    prefix: str,
) -> dict[str, Any]:
    """Translate the sources into a file: print and return BLEU, chrF++ and TER against the references as text."""
    before = search_counts(memory)
    found = translate(model, tokenizer, subset.pairs, settings, training.per_device_eval_batch_size)
    path = Path(str(training.output_dir)) / f"{prefix}generated_predictions.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(str(path)) as file:
        file.write("".join(f"{text}\n" for text in found.texts))
    scored = score_texts("sacrebleu", found.texts, [pair.target for pair in subset.texts])
    sys.stdout.write(f"Translated {len(found.texts)} sentences in {found.seconds:.1f} seconds: {path}\n")
    sys.stdout.write("".join(f"{line}\n" for line in scored.lines))
    told = scored.figures | {"signatures": scored.signatures, "num_sentences": len(found.texts)}
    told |= {"generation_seconds": found.seconds}
    return told | {f"generation_{name}": value for name, value in search_figures(memory, before).items()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    run("run_translation.py", main)
