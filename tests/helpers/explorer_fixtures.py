"""A tiny model's datastore, saved neighbours of its valid text, and a way to open what fairseq-explore opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from fairseq.explorer.explanation import Explanation

EVAL = ("--cpu", "--max-tokens", "64", "--context-window", "16")
KNN = ("--knnlm", "--lmbda", "0.3", "--softmax-temp", "2", "--k", "16")

TRANSLATION_MODEL = (
    "--task translation --arch transformer_tiny --encoder-layers 1 --decoder-layers 1 --dropout 0 --optimizer adam "
    "--lr 0.01 --criterion cross_entropy --max-tokens 400 --max-update 12 --cpu --no-progress-bar --num-workers 0 "
    "--no-epoch-checkpoints"
).split()

Explored = Callable[..., "Explanation"]


class Kept(NamedTuple):
    """Saved neighbours and what the evaluation said."""

    path: Path
    figures: dict[str, Any]
    logp: np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def explored_words(data_bin: Path, trained: Path) -> list[str]:
    """Words of every evaluation of the tiny model on valid."""
    return [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *EVAL, "--gen-subset", "valid"]


@pytest.fixture(scope="session")
def explored_store(data_bin: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a datastore of the training text."""
    from fairseq_cli import eval_lm

    prefix = tmp_path_factory.mktemp("explored") / "d"
    saving = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", str(prefix)]
    eval_lm.main([str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *EVAL, *saving])
    return prefix


@pytest.fixture(scope="session")
def kept(explored_words: list[str], explored_store: Path) -> Kept:
    """valid with its neighbours, saved."""
    from fairseq_cli import eval_lm

    folder = explored_store.parent
    files = {"--save-retrieval": "valid.retrieval", "--eval-file": "valid.json", "--scores-file": "valid.npz"}
    out = [word for name, file in files.items() for word in (name, str(folder / file))]
    eval_lm.main([*explored_words, *KNN, "--dstore-filename", str(explored_store), *out])
    logp = np.load(folder / "valid.npz")["logp"]
    return Kept(folder / "valid.retrieval", json.loads((folder / "valid.json").read_text()), logp)


@pytest.fixture
def explored() -> Iterator[Explored]:
    """Open a kind of exploration by the words of its command, completely scored."""
    from fairseq_cli.web.explore import KINDS

    entered = []

    def call(kind: str, *words: object) -> Explanation:
        _, open_ = KINDS[kind]([str(word) for word in words])
        opened = open_()
        opened.__enter__()
        entered.append(opened)
        opened.finish()
        return opened.explanation

    yield call
    for opened in entered:
        opened.__exit__(None, None, None)


@pytest.fixture(scope="session")
def explored_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of generate.py with a model that has learned a little, and the folder of its texts and datastore."""
    from fairseq_cli import preprocess, save_datastore, train

    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("train", 60), ("valid", 10), ("test", 6)):
        sentences = [random.integers(0, 12, random.integers(2, 9)).tolist() for _ in range(count)]
        for lang in "ab":
            lines = [" ".join(f"{lang}{word}" for word in sentence) for sentence in sentences]
            (folder / f"{split}.{lang}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    preprocess.main(["--source-lang", "a", "--target-lang", "b", *texts, "--destdir", str(folder / "bin")])
    train.main([str(folder / "bin"), *TRANSLATION_MODEL, "--save-dir", str(folder)])
    path = ["--path", str(folder / "checkpoint_last.pt"), "--cpu", "--max-tokens", "60"]
    save_datastore.main([str(folder / "bin"), *path, "--dstore-mmap", str(folder / "store")])
    return [str(folder / "bin"), *path, "--beam", "3", "--max-len-b", "8"], folder
