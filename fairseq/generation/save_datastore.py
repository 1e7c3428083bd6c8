"""save_datastore.py: the decoder's state and the next token of every target position of a split, resumable.

Source: arXiv 2010.00710, sec. 3.1.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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


def require_rows(text: StoreText, stated: int | None) -> int:
    """Rows of the store. Raises: ValueError when the user stated another number."""
    rows = text.num_rows
    if stated is not None and stated != rows:
        raise ValueError(
            f"--dstore-size {stated} does not fit: split {text.subset!r} has {rows} target tokens, </s> included; give "
            f"{rows}, or leave the flag out"
        )
    return rows


def metadata_of(text: StoreText, model: TransformerLanguageModel, path: str, key_tap: str) -> dict[str, Any]:
    """Everything by which a store's rows differ from those of another model, text or setting."""
    task, ids = text.task, text.ids
    prefixes = task.prefixes(text.subset)
    return {
        "key_tap": key_tap,
        "subset": text.subset,
        "model_digest": file_digest(path),
        "dictionary_digest": task.dictionary.digest(),
        "dictionary_size": len(task.dictionary),
        "source_dictionary_digest": task.source.digest(),
        "text_digest": file_digest(f"{prefixes[-1]}.bin"),
        "source_text_digest": file_digest(f"{prefixes[0]}.bin"),
        "document_unit": "sentence pair",
        "num_documents": len(text.dataset),
        "batches_digest": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def save_pairs(
    text: StoreText, model: TransformerLanguageModel, path: str, prefix: str, dtype: str, key_tap: str
) -> int:
    """Write the store, or go on with an interrupted one, and print its size and the speed; returns its rows.

    Args:
        path: checkpoint of the model.
        prefix: of the store; a folder with a slash at its end.
        dtype: type of the keys on disk.
        key_tap: inner state that is the key.
    Raises: ValueError or OSError when the store cannot be written.
    """
    order = text.ids
    sizes = text.dataset.target_sizes[order]
    documents = np.stack([np.cumsum(sizes) - sizes, order, np.zeros_like(order)], axis=1)
    scorer = SequenceScorer([model], key_tap=key_tap, device=next(model.parameters()).device)
    started = time.perf_counter()
    with DatastoreWriter(
        prefix,
        num_rows=text.num_rows,
        dim=model.key_dim(key_tap),
        dtype=dtype,
        metadata=metadata_of(text, model, path, key_tap),
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
    return text.num_rows
