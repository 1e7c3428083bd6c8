"""A tiny model's datastore, saved neighbours of its valid text, and a way to open what fairseq-explore opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import learned_pairs
import numpy as np
import pytest

if TYPE_CHECKING:
    from fairseq.explorer.explanation import Explanation

EVAL = ("--cpu", "--max-tokens", "64", "--context-window", "16")
KNN = ("--knnlm", "--lmbda", "0.3", "--softmax-temp", "2", "--k", "16")

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
    folder = tmp_path_factory.mktemp("pairs")
    words = learned_pairs.make(folder, {"train": 60, "valid": 10, "test": 6})
    return [*words, "--beam", "3", "--max-len-b", "8"], folder
