"""save_datastore.py: the decoder's state and the next token of every target position of a split, resumable.

Source: arXiv 2010.00710, sec. 3.1.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.memory.datastore.metadata import OVERWRITE, is_saved
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.runtime.manifest import file_digest
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.data.language_pair_dataset import LanguagePairDataset
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.tasks.translation import TranslationTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreText:
    """Sentence pairs whose target positions become rows, in the order of their batches."""

    task: TranslationTask
    subset: str
    dataset: LanguagePairDataset
    batches: list[Any]

    @functools.cached_property
    def ids(self) -> Any:
        """int64 numbers of the pairs in the order of the rows."""
        return np.concatenate([self.dataset.batch_order(batch) for batch in self.batches])

    @property
    def num_rows(self) -> int:
        """Target tokens, </s> included."""
        return int(self.dataset.target_sizes[self.ids].sum())

    def batches_digest(self) -> str:
        """Digest of what the model reads together: the pairs in their order, their sizes, and where batches end.

        A save is resumed by batches, and sources may be cut: the order alone does not tell the rows.
        """
        arrays = [self.ids, self.dataset.source_sizes[self.ids], self.dataset.target_sizes[self.ids]]
        arrays.append(np.array([len(batch) for batch in self.batches]))
        return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in arrays)).hexdigest()


def require_rows(text: StoreText, stated: int | None) -> int:
    """Rows of the store. Raises: ValueError when the user stated another number."""
    rows = text.num_rows
    if stated is not None and stated != rows:
        raise ValueError(
            f"--dstore-size {stated} does not fit: split {text.subset!r} has {rows} target tokens, </s> included; give "
            f"{rows}, or leave the flag out"
        )
    return rows


@dataclass(frozen=True)
class StorePlace:
    """Where a store goes, and what it is made from besides the text."""

    prefix: str
    """Of the files; a folder with a slash at its end."""
    path: str
    """Checkpoint of the model."""
    key_tap: str
    """Inner state that is the key."""
    dtype: str
    """Type of the keys on disk."""
    overrides: Mapping[str, Any] | None
    """Settings of the model that replace the checkpoint's."""
    overwrite: bool
    """Replace a complete store of anything else."""


def facts_of(task: TranslationTask, subset: str, place: StorePlace) -> dict[str, Any]:
    """What is known of a store before its model is loaded."""
    prefixes = task.prefixes(subset)
    return {
        "key_tap": place.key_tap,
        "subset": subset,
        "model_digest": file_digest(place.path),
        "model_overrides": repr(sorted((place.overrides or {}).items())),
        "dictionary_digest": task.dictionary.digest(),
        "dictionary_size": len(task.dictionary),
        "source_dictionary_digest": task.source.digest(),
        "text_digest": file_digest(f"{prefixes[-1]}.bin"),
        "source_text_digest": file_digest(f"{prefixes[0]}.bin"),
        "document_unit": "sentence pair",
    }


def metadata_of(text: StoreText, model: TransformerLanguageModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything by which a store's rows differ from those of another model, text or setting."""
    return {
        **facts,
        "num_documents": len(text.dataset),
        "batches_digest": text.batches_digest(),
        "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def save_pairs(text: StoreText, model: TransformerLanguageModel, place: StorePlace, facts: Mapping[str, Any]) -> bool:
    """Write the store, or resume an interrupted save, and print its size and the speed; False if it is there already.

    Args:
        facts: of :func:`facts_of`, which reads whole files.
    Raises: ValueError or OSError when the store cannot be written, or a complete one of anything else is there.
    """
    prefix, key_tap, metadata = place.prefix, place.key_tap, metadata_of(text, model, facts)
    sizes_of_store = {"rows": text.num_rows, "dim": model.key_dim(key_tap)}
    if is_saved(prefix, place.dtype, metadata | sizes_of_store, overwrite=place.overwrite):
        sys.stdout.write(f"{prefix} is complete already; {OVERWRITE} saves it again\n")
        return False
    order = text.ids
    sizes = text.dataset.target_sizes[order]
    documents = np.stack([np.cumsum(sizes) - sizes, order, np.zeros_like(order)], axis=1)
    scorer = SequenceScorer([model], key_tap=key_tap, device=next(model.parameters()).device)
    started = time.perf_counter()
    with DatastoreWriter(
        prefix,
        num_rows=text.num_rows,
        dim=model.key_dim(key_tap),
        dtype=place.dtype,
        metadata=metadata,
        documents=documents,
    ) as writer:
        done = int((writer.cursor or {}).get("batch", 0))
        if done:
            logger.info("resuming at row %d of %d", writer.rows_done, writer.num_rows)
        for batch in text.task.iterator(text.dataset, text.batches[done:]):
            scored = scorer.keys(batch)
            writer.append(scored.keys, scored.target_N)
            done += 1
            writer.checkpoint_when_due({"batch": done})
        writer.checkpoint({"batch": done})
        writer.finish()
    seconds = time.perf_counter() - started
    sys.stdout.write(
        f"saved {text.num_rows} keys of width {writer.dim} to {prefix} in {seconds:.1f}s "
        f"({text.num_rows / max(seconds, 1e-9):.0f} tokens/s)\n"
    )
    return True
