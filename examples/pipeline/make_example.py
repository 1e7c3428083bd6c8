"""Make what ``configs/main.yaml`` names: pairs as .jsonl, and a small random T5 with a tokenizer of its own.

bash get_data.sh multi30k --text-only
python examples/pipeline/make_example.py [source=downloads/multi30k] [folder=output/pipeline] [num_train=6000]
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, logging

from fairseq.registry import did_you_mean
from fairseq.runtime.atomic_files import writing
from fairseq_cli.entry import run

DEFAULTS = {"source": "downloads/multi30k", "folder": "output/pipeline", "num_train": 6000, "vocabulary": 2000}
SPECIAL = ["<pad>", "</s>", "<unk>"]


def main(argv: Sequence[str]) -> None:
    """Write the files; the same ones each time."""
    given = OmegaConf.from_cli(list(argv))
    for key in given:
        if key not in DEFAULTS:
            raise ValueError(f"unknown key {key}{did_you_mean(str(key), DEFAULTS)}; known: {', '.join(DEFAULTS)}")
    logging.disable_progress_bar()
    settings = OmegaConf.merge(DEFAULTS, given)
    folder = Path(settings.folder)
    train = list(itertools.islice(read_pairs(Path(settings.source), "train"), int(settings.num_train)))
    write_pairs(folder / "data" / "train.jsonl", train)
    write_pairs(folder / "data" / "val.jsonl", list(read_pairs(Path(settings.source), "val")))
    tokenizer = make_tokenizer(train, int(settings.vocabulary))
    make_model(len(tokenizer)).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    sys.stdout.write(f"{folder}: {len(train)} pairs, a T5 with {len(tokenizer)} tokens\n")


def read_pairs(source: Path, subset: str) -> Iterator[tuple[str, str]]:
    """German and English sentences of Multi30k's files."""
    with (
        gzip.open(source / f"{subset}.de.gz", "rt", encoding="utf-8") as german,
        gzip.open(source / f"{subset}.en.gz", "rt", encoding="utf-8") as english,
    ):
        for pair in zip(german, english, strict=True):
            yield pair[0].strip(), pair[1].strip()


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """One object a line: what the pipeline reads."""
    with writing(path) as file:
        for source, target in pairs:
            file.write(json.dumps({"input": source, "output": target}, ensure_ascii=False) + "\n")


def make_tokenizer(pairs: Sequence[tuple[str, str]], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of both languages that ends each text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(itertools.chain.from_iterable(pairs), trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(vocabulary: int) -> T5ForConditionalGeneration:
    """A T5 of half a million parameters."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


if __name__ == "__main__":
    run("make_example.py", main)
