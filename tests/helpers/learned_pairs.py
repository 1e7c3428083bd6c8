"""Texts of two languages, a small model that has learned a little of them, and its datastore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

MODEL = (
    "--task translation --arch transformer_tiny --encoder-layers 1 --decoder-layers 1 --dropout 0 --optimizer adam "
    "--lr 0.01 --criterion cross_entropy --max-tokens 400 --max-update 12 --cpu --no-progress-bar --num-workers 0 "
    "--no-epoch-checkpoints"
).split()


def make(folder: Path, counts: Mapping[str, int]) -> list[str]:
    """Make all of it; returns words of generate.py: the data, the model, batches.

    Args:
        counts: sentences of train, valid and test.
    """
    from fairseq_cli import preprocess, save_datastore, train

    random = np.random.default_rng(0)
    for split, count in counts.items():
        sentences = [random.integers(0, 12, random.integers(2, 9)).tolist() for _ in range(count)]
        for lang in "ab":
            lines = [" ".join(f"{lang}{word}" for word in sentence) for sentence in sentences]
            (folder / f"{split}.{lang}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"--{split}pref={folder / split}" for split in counts]
    preprocess.main(["--source-lang", "a", "--target-lang", "b", *texts, "--destdir", str(folder / "bin")])
    train.main([str(folder / "bin"), *MODEL, "--save-dir", str(folder)])
    words = [str(folder / "bin"), "--path", str(folder / "checkpoint_last.pt"), "--cpu", "--max-tokens", "60"]
    save_datastore.main([*words, "--dstore-mmap", str(folder / "store")])
    return words
