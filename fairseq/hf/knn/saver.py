"""Saves a datastore while a model reads a text: a key and the token that came next for every position that counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq.config import in_python
from fairseq.hf.hooks.attachment import IGNORED, Attachment, ForwardCall
from fairseq.hf.hooks.capture import Capture
from fairseq.hf.hooks.identity import model_type
from fairseq.hf.hooks.names import key_type
from fairseq.hf.hooks.protocols import ModelOutput, Tokenizer
from fairseq.hf.hooks.taps import Tap
from fairseq.hf.knn.stores import index_name, store_metadata, store_prefix
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.datastore.metadata import OVERWRITE, is_saved
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.build.build import BuiltIndex, build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CHECKPOINTS = 10.0


class KNNSaver(Attachment):
    """Saves a datastore: keeps a key and the next token for every position of every forward call that has labels.

    To resume an interrupted run, make the same calls again from the beginning: rows that are on disk are compared, not
    rewritten. ``has_saved`` says beforehand whether a call can be skipped.

    Source: arXiv 1911.00172, sec. 2.

    ```python
    with KNNSaver(dstore_dir="gpt2-store")(model) as saver:
        model(input_ids=ids_BT, labels=ids_BT)  # one call per batch of your text
    ```
    """

    def __init__(
        self,
        dstore_size: int | None = None,
        dstore_dir: str | Path = ".",
        dimension: int | None = None,
        knn_keytype: str | Enum | None = None,
        *,
        name: str | None = None,
        dtype: str = "float16",
        tokenizer: Tokenizer | None = None,
        metadata: Mapping[str, Any] | None = None,
        first_sequence: int = 0,
        overwrite_dstore: bool = False,
    ) -> None:
        """Args.

        dstore_size: rows that will come, checked if given.
        dstore_dir: folder of the store.
        dimension: width of the keys, checked if given.
        knn_keytype: ``last_ffn_input`` (default), ``last_ffn_output`` or ``final_hidden``.
        name: name of the store's files in the folder; by default made of the model's type and the sizes.
        dtype: type of the keys on disk: float16, bfloat16 or float32.
        tokenizer: the text's; a model with another one is then rejected.
        metadata: more facts of the store, such as its place among shards. Equal facts must mean equal rows.
        first_sequence: number of the first sequence, where a shard's are counted over the whole store.
        overwrite_dstore: True replaces the complete store of another model that has the name; a model's own one is
            replaced without it.
        Raises: ValueError when a number is impossible.
        """
        super().__init__(key_type(knn_keytype))
        for what, value in (("dstore_size", dstore_size), ("dimension", dimension)):
            if value is not None and value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}; drop it or correct it")
        self._rows, self._dim, self._folder, self._name = dstore_size, dimension, dstore_dir, name
        self._dtype, self._tokenizer = dtype, tokenizer
        self._metadata, self._first_sequence = dict(metadata or {}), first_sequence
        self._overwrite = overwrite_dstore
        self._writer: DatastoreWriter | None = None
        self.prefix: str | None = None

    @property
    def rows_done(self) -> int:
        """Number of rows written, those of an interrupted earlier run included."""
        return self._writer.rows_done if self._writer else 0

    def has_saved(self, labels: Tensor, attention_mask: Tensor | None = None) -> bool:
        """True if the next call's rows are on disk, so that it can be skipped; asking counts as making the call.

        Raises: ValueError when the rows on disk are of another text.
        """
        place_N2, value_N = self._rows_of(self._call_with(labels, attention_mask))
        if self._seen + len(value_N) > self._resumed_at:
            return False
        seen = self._seen
        self._skip(value_N)
        self._note(place_N2, seen)
        return True

    def build_index(
        self,
        num_keys_to_add_at_a_time: int = 1_000_000,
        ncentroids: int = 4096,
        seed: int = 1,
        code_size: int = 64,
        probe: int = 32,
        train_size: int = 1_000_000,
    ) -> BuiltIndex:
        """Build an index over the saved store, or resume an interrupted build. Raises: ValueError, OSError."""
        if self.prefix is None:
            raise ValueError("no store was saved yet; build_index comes after break_out()")
        with python_wording():
            return build_index(
                BuildConfig(
                    dstore_mmap=self.prefix,
                    faiss_index=index_name(self.prefix),
                    num_keys_to_add_at_a_time=num_keys_to_add_at_a_time,
                    ncentroids=ncentroids,
                    seed=seed,
                    code_size=code_size,
                    probe=probe,
                    train_size=train_size,
                )
            )

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        if self._dim is not None and self._dim != tap.dim:
            raise ValueError(f"the model's keys are of width {tap.dim}, dimension says {self._dim}; drop it")
        name = store_prefix(self._folder, model_type(model), self._rows, tap.dim)
        prefix = name if self._name is None else str(Path(self._folder) / self._name)
        facts = store_metadata(model, tap, self._tokenizer) | self._metadata
        with python_wording():
            if is_saved(prefix, self._dtype, facts | {"dim": tap.dim}, overwrite=self._overwrite):
                logger.warning("%s: this model's complete datastore is there, and is replaced by a new one", prefix)
        self._writer = DatastoreWriter(prefix, self._rows, tap.dim, self._dtype, facts)
        self.prefix = prefix
        self._resumed_at, self._seen, self._num_sequences = self._writer.rows_done, 0, self._first_sequence
        self._runs: list[Array] = []
        if self._resumed_at:
            logger.info("%s: %d rows of an earlier run are kept", prefix, self._resumed_at)

    def _end(self, *, failed: bool) -> None:
        """Complete the store. Raises: ValueError when rows are missing; what is there is kept."""
        writer, self._writer = self._writer, None
        assert writer is not None
        with writer:
            if failed:
                writer.checkpoint()
            else:
                runs = np.concatenate(self._runs) if self._runs else None
                writer.finish(documents=runs)

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        if ForwardCall(named, self.is_seq2seq).target() is None:
            raise ValueError(
                "saving needs labels: the value of a key is the token that came next; call model(input_ids=ids, "
                "labels=ids), with -100 where nothing is to be saved"
            )
        return named

    def add(self, key_BTD: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> None:
        """Keep the keys of a call that was made while this was paused."""
        self._keep(self._call_with(labels, attention_mask), key_BTD)

    def _call_with(self, labels: Tensor, attention_mask: Tensor | None) -> ForwardCall:
        mask = "decoder_attention_mask" if self.is_seq2seq else "attention_mask"
        return ForwardCall({"labels": labels, mask: attention_mask}, self.is_seq2seq)

    def _see(self, call: ForwardCall, capture: Capture, output: ModelOutput) -> ModelOutput:
        target_BT = call.target()
        assert target_BT is not None
        with torch.no_grad():
            self._keep(call, capture.take(len(target_BT)))
        return output

    def _keep(self, call: ForwardCall, key_BTD: Tensor) -> None:
        place_N2, value_N = self._rows_of(call)
        scored_BT = call.kept(self._counting(call), key_BTD.shape[1])
        key_ND = key_BTD[scored_BT.to(key_BTD.device)]
        assert self._writer is not None
        known = min(len(value_N), max(0, self._resumed_at - self._seen))
        seen = self._seen
        try:
            self._skip(value_N[:known])
            self._writer.append(key_ND[known:], value_N[known:])
        except ValueError:
            self._seen = seen  # a call that fails leaves no trace
            raise
        self._note(place_N2, seen)
        self._seen = seen + len(value_N)
        self._writer.checkpoint_when_due(seconds=_SECONDS_BETWEEN_CHECKPOINTS)

    def _counting(self, call: ForwardCall) -> Tensor:
        """True where a row is made, (B, T): the token to predict counts, and neither it nor the position is padding."""
        target_BT = call.target()
        assert target_BT is not None
        counts_BT = target_BT != IGNORED
        is_text_BT = call.is_text(target_BT.shape[1])
        if is_text_BT is not None:
            counts_BT = counts_BT & is_text_BT.to(counts_BT.device)
            if not self.is_seq2seq:
                counts_BT[:, :-1] &= is_text_BT[:, 1:].to(counts_BT.device)
        return counts_BT

    def _rows_of(self, call: ForwardCall) -> tuple[Array, Tensor]:
        """Sequence and place of the value of each row a call makes, (N, 2), and the values, (N,)."""
        target_BT = call.target()
        assert target_BT is not None
        counts_BT = self._counting(call)
        places = counts_BT.nonzero().cpu().numpy() + [0, 0 if self.is_seq2seq else 1]
        return places, target_BT[counts_BT].cpu()

    def _skip(self, value_N: Tensor) -> None:
        """Pass over rows that are on disk. Raises: ValueError when their tokens are others."""
        if not len(value_N):
            return
        assert self._writer is not None
        held_N = torch.from_numpy(self._writer.written_values(self._seen, self._seen + len(value_N)))
        if not torch.equal(held_N, value_N.long()):
            raise ValueError(
                f"the unfinished datastore {self.prefix!r} holds other tokens from row {self._seen} on: it is of "
                f"another text or order; remove {StoreFiles.of(str(self.prefix)).progress} to start again"
            )
        self._seen += len(value_N)

    def _note(self, place_N2: Array, first_row: int) -> None:
        """Note where the rows from ``first_row`` on stand: each sequence is a document."""
        if len(place_N2):
            document_N, offset_N = place_N2[:, 0] + self._num_sequences, place_N2[:, 1]
            self._runs.append(Documents.of_positions(document_N, offset_N, first_row).runs_R3)
            self._num_sequences = int(document_N[-1]) + 1


@contextmanager
def python_wording() -> Iterator[None]:
    """Errors of the commands' functions name the arguments of Python instead of flags."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace("use --index flat", "build none: without an index the search is exact")
        message = message.replace(f"replace the store with {OVERWRITE}", "replace the store with overwrite_dstore=True")
        raise ValueError(in_python(message)) from None
