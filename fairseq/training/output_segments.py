"""train.py --output-segments-to-file and --output-samples-to-file: the training text as JSON, for bm25_search.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fairseq.tasks import TASKS
from fairseq.tasks.configs import LanguageModelingConfig, TranslationConfig

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary
    from fairseq.data.language_pair_dataset import LanguagePairDataset

_UNKNOWN = "UNKNOWNTOKENINREF"
"""TRIME's program for translation writes <unk> so."""


def output_segments(path: str, task_name: str, task_config: LanguageModelingConfig, split: str) -> None:
    """Write a split's blocks in corpus order, so that a block's number is its segment's id.

    Raises: ValueError when there are several data folders: their blocks' numbers are not one another's.
    """
    from fairseq.data.segments import write_segments

    task = _task_of_one_folder("--output-segments-to-file", "blocks", task_name, task_config)
    if task.source is not None:
        raise ValueError(
            f"--output-segments-to-file writes blocks of a language model, and --task {task_name} has sentence pairs; "
            "give --output-samples-to-file"
        )
    dataset = task.blocks(split, combine=True)
    count = write_segments(path, dataset.blocks, task.dictionary)
    sys.stdout.write(f"wrote {count} segments of at most {int(dataset.sizes.max(initial=0))} tokens: {path}\n")


def output_samples(path: str, task_name: str, task_config: TranslationConfig, split: str) -> None:
    """Write a split's target sentences as text in corpus order, so that a pair's number is its sentence's id.

    Raises: ValueError for another task than translation, or several data folders.
    """
    from fairseq.data.codecs import CodecConfig, TextCodec
    from fairseq.data.segments import write_texts

    task = _task_of_one_folder("--output-samples-to-file", "sentence pairs", task_name, task_config)
    if task.source is None:
        raise ValueError(
            f"--output-samples-to-file writes target sentences, and --task {task_name} has none; give --task "
            "translation, or --output-segments-to-file"
        )
    dataset = task.blocks(split, combine=True)
    codec = TextCodec.of(CodecConfig(tokenizer=task_config.eval_bleu_detok, target_lang=task.target_lang))
    mark = task_config.eval_bleu_remove_bpe or "@@ "
    count = write_texts(path, map(codec.decode, _targets(dataset, task.dictionary, mark)), int)
    sys.stdout.write(f"wrote {count} sentences: {path}\n")


def _task_of_one_folder(option: str, units: str, task_name: str, task_config: Any) -> Any:
    task = TASKS[task_name].load()(task_config)
    if len(task.folders) > 1:
        raise ValueError(
            f"{option} numbers the {units} of one data folder, {len(task.folders)} are given; give "
            f"{task.folders[0]!r} alone"
        )
    return task


def _targets(dataset: LanguagePairDataset, dictionary: Dictionary, mark: str) -> Iterator[str]:
    """Target sentences with the pieces of each word joined."""
    from fairseq.data.dictionary import join_pieces

    unknown = dictionary[dictionary.unk()]
    for number in range(len(dataset)):
        pieces = dictionary.string(dataset.target(number)).split(" ")
        yield join_pieces(" ".join(_UNKNOWN if piece == unknown else piece for piece in pieces), mark)
