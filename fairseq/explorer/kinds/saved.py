"""Explanations of saved retrievals (``--save-retrieval``): opened by mapping, whatever their size."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.data.dictionary import Dictionary
from fairseq.explorer.explanation import Explanation
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.rules import INTERPOLATION, JOINT, Rule, Setting
from fairseq.explorer.text_table import CandidateArrays, TextTable
from fairseq.explorer.words import DictionaryWords, NumberWords, Words
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.retrieval.explain import open_store
from fairseq.memory.retrieval.file import Retrieval
from fairseq.memory.retrieval.schema import ABOUT, JOINT_ABOUT, MADE_OF
from fairseq.memory.retrieval.sweep import require_whole
from fairseq.metrics.word_loss import joined
from fairseq.runtime.records import require

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

NO_WORDS = "No dictionary is at hand: tokens are shown as their numbers."
NO_STORE = "The datastore is not at hand: neighbours are shown without their contexts."


def open_saved(paths: Sequence[str], dictionary: str | None = None, dstore: str | None = None) -> Explanation:
    """The explanation of the files of one evaluation.

    Args:
        paths: the file, or those of all shards.
        dictionary: file of the dictionary; by default where the evaluation found it.
        dstore: prefix of the datastore; by default where it lay.
    Raises: ValueError or OSError for a file that is missing, damaged or of another evaluation, and for a dictionary or
        a datastore of another text.
    """
    if not paths:
        raise ValueError("name a file of --save-retrieval; eval_lm.py --knnlm --save-retrieval FILE writes one")
    opened = [_open(path) for path in paths]
    require_whole(opened)
    first = opened[0]
    words, notes = _words(first, dictionary)
    store = _store(first, dstore)
    if store is None:
        logger.warning("%s", NO_STORE)
        notes += (NO_STORE,)
    about, made_of = first.about, first.fingerprint
    return Explanation(
        kind="trime" if first.is_joint and "mode" in about else "knn",
        title=os.path.basename(paths[0]),
        table=_table(opened),
        neighbors=NeighborTexts(words, store),
        rule=_rule(first),
        opening=_setting(first),
        metric="ip" if made_of.get("score") == "dot" else str(made_of.get("metric", "l2")),
        unit="sentence" if about["program"] == "generate.py" else "block",
        notes=notes,
        facts={
            "split": str(made_of.get("subset", "")),
            "model": str(about.get("path", "")),
            "datastore": store.prefix if store is not None else str(about.get("store", {}).get("prefix", "")),
            "saved by": str(about["program"]),
        },
    )


def _open(path: str) -> Retrieval:
    retrieval = Retrieval.open(path)
    require(retrieval.fingerprint, MADE_OF, f"{path}: its made_of")
    require(retrieval.about, JOINT_ABOUT if retrieval.is_joint else ABOUT, f"{path}: its about")
    return retrieval


def _rule(retrieval: Retrieval) -> Rule:
    dim = int(retrieval.fingerprint["dim"])
    if retrieval.is_joint:
        return Rule(JOINT, dim, with_external=retrieval.about.get("mode") != "li")
    return Rule(INTERPOLATION, dim)


def _setting(retrieval: Retrieval) -> Setting:
    """The setting of the evaluation that saved a file."""
    about, weight = retrieval.about, retrieval.about.get("weight")
    weight = None if weight is None else float(weight)
    if not retrieval.is_joint:
        return Setting(retrieval.k, weight or 0.0, float(about["temperature"]))
    if "interp_temp" not in about:
        return Setting(retrieval.k, None, None, float(about["temperature"]))
    return Setting(retrieval.k, weight or 0.0, float(about["interp_temp"]), float(about["temperature"]))


def _words(retrieval: Retrieval, path: str | None) -> tuple[Words, tuple[str, ...]]:
    """The dictionary's words, or numbers with a note. Raises: ValueError for a dictionary of another text."""
    name = path or str(retrieval.about.get("dictionary", ""))
    if path is None and not os.path.isfile(name):
        logger.warning("no dictionary at %r: tokens are shown as their numbers; --dictionary FILE names it", name)
        return NumberWords(), (NO_WORDS,)
    if not os.path.isfile(name):
        raise ValueError(f"--dictionary: no file {name!r}; leave it out to see tokens as their numbers")
    dictionary = Dictionary.load(name)
    if dictionary.digest() != retrieval.fingerprint.get("dictionary_digest"):
        raise ValueError(
            f"dictionary {name} ({len(dictionary)} types) is not the one of {retrieval.path} "
            f"({retrieval.fingerprint.get('dictionary_size')} types); name that one by --dictionary"
        )
    return DictionaryWords(dictionary), ()


def _store(retrieval: Retrieval, prefix: str | None) -> Datastore | None:
    """The datastore, or None where it lay before and is gone. Raises: ValueError for another one."""
    place = retrieval.about.get("store")
    if prefix is None and isinstance(place, dict):
        saved = str(place.get("prefix", ""))
        files = StoreFiles.of(saved)
        if not (files.metadata.exists() or files.values.exists() or os.path.isdir(saved)):
            return None
    return open_store(retrieval, prefix)


def _table(opened: Sequence[Retrieval]) -> TextTable:
    """The tokens of all files in the order of the text."""
    sizes = [len(retrieval) for retrieval in opened]
    file_N = np.repeat(np.arange(len(opened)), sizes)
    row_N = np.concatenate([np.arange(size) for size in sizes])

    def column(name: str, dtype: Any) -> Array:
        return np.concatenate([np.asarray(retrieval.arrays[name], dtype) for retrieval in opened])

    block_N = column("block", np.int64)
    order = np.argsort(block_N, kind="stable")
    file_N, row_N, block_N = file_N[order], row_N[order], block_N[order]
    columns: dict[str, Array] = {"token": column("target", np.int64)[order], "block": block_N, "document": block_N}
    columns["counted"] = ~joined(block_N, column("continues", np.bool_)[order])
    columns |= {"lm": column("lm_logp", np.float32)[order], "norm": column("lm_norm", np.float32)[order]}
    if "near_hit" in opened[0].arrays:
        columns |= {"hit:text": column("near_hit", np.float32)[order]}
        columns |= {"whole:text": column("near_whole", np.float32)[order]}

    def fetch(rows: slice) -> CandidateArrays:
        files_n, rows_n = file_N[rows], row_N[rows]
        arrays = CandidateArrays(
            *(np.empty((len(rows_n), opened[0].k), dtype) for dtype in (np.float32, np.int32, np.int64))
        )
        for number in np.unique(files_n):
            here = files_n == number
            for name, out in zip(("scores", "values", "ids"), arrays):
                out[here] = opened[number].arrays[name][rows_n[here]]
        return arrays

    return TextTable(columns, opened[0].k, fetch)
