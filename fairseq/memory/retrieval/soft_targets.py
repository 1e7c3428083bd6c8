"""The neighbours' distribution at each token of a text, as a file that a small decoder is trained on.

The format is the one that Memory Decoder (arXiv 2508.09874) trains from: an Arrow IPC stream with a row for each token
and the columns ``id_cnt`` (int32), ``token_id`` (lists of int32), ``prob`` (lists of float16) and ``label`` (int32).

Shapes: N tokens, K neighbours, M entries of all their distributions, R rows of a record batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.memory.retrieval.file import Retrieval
from fairseq.runtime.lazy import missing_extra

Array = npt.NDArray[Any]

FORMAT = "fairseq-memory knn targets"
COLUMNS = ("id_cnt", "token_id", "prob", "label")
_ROWS = 16384
_COMPARED = 1 << 20  # rows of the store at a time
_BEGINNING = 64  # tokens by which a text is looked for


def _arrow() -> Any:
    """pyarrow. Raises: MissingExtraError with the pip command."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    return pyarrow


@dataclass(frozen=True)
class Distributions:
    """Sparse distributions over tokens, one after the other."""

    count_N: Array
    """int32 entries of each."""
    token_M: Array
    """int32, rising within a distribution."""
    prob_M: Array
    """float16, above 0."""


def distributions(value_NK: Array, score_NK: Array, keep_NK: Array, temperature: float) -> Distributions:
    """The softmax of score / temperature over the neighbours that are kept, summed per token.

    Tokens whose share float16 cannot hold are dropped; a row without neighbours has no entries.
    Source: arXiv 1911.00172, sec. 2.
    """
    score_NK = np.where(keep_NK, score_NK.astype(np.float64) / temperature, -np.inf)
    top_N1 = score_NK.max(1, keepdims=True, initial=-np.inf)
    share_NK = np.exp(score_NK - np.where(np.isneginf(top_N1), 0.0, top_N1))
    total_N1 = share_NK.sum(1, keepdims=True)
    share_NK /= np.where(total_N1 > 0, total_N1, 1.0)
    order_NK = np.argsort(value_NK, axis=1, kind="stable")
    value_NK, share_NK = (np.take_along_axis(each, order_NK, 1) for each in (value_NK, share_NK))
    begins_NK = np.ones(value_NK.shape, dtype=bool)
    begins_NK[:, 1:] = value_NK[:, 1:] != value_NK[:, :-1]
    begin_M = np.flatnonzero(begins_NK)
    prob_M = np.add.reduceat(share_NK.ravel(), begin_M).astype(np.float16) if len(begin_M) else np.empty(0, np.float16)
    held_M = prob_M > 0
    row_M = begin_M[held_M] // value_NK.shape[1] if len(begin_M) else np.empty(0, np.int64)
    count_N = np.bincount(row_M, minlength=len(value_NK)).astype(np.int32)
    return Distributions(count_N, value_NK.ravel()[begin_M[held_M]].astype(np.int32), prob_M[held_M])


def _stands_at(label_N: Array, row: int, values: Any) -> bool:
    """True if the store's rows from this one on are the text."""
    end = row + len(label_N)
    return end <= len(values) and all(
        np.array_equal(label_N[start - row : start - row + _COMPARED], values.block(start, min(start + _COMPARED, end)))
        for start in range(row, end, _COMPARED)
    )


def _places(begin_B: Array, values: Any) -> Iterator[int]:
    """Rows at which the beginning of a text stands in the store."""
    num_rows = len(values) - len(begin_B) + 1
    for start in range(0, num_rows, _COMPARED):
        count = min(_COMPARED, num_rows - start)
        value_R = values.block(start, start + count + len(begin_B) - 1).numpy()
        place_P = np.flatnonzero(value_R[:count] == begin_B[0])
        for offset in range(1, len(begin_B)):
            place_P = place_P[value_R[place_P + offset] == begin_B[offset]]
        yield from (start + place_P).tolist()


@dataclass(frozen=True)
class OwnRows:
    """The row of the datastore that each token of a text is itself, for a store that holds the text in one piece."""

    skipped: int | None
    """Tokens at the start that the store lacks, or, negative, rows before the first token; None for a store of another
    text."""

    @classmethod
    def of(cls, label_N: Array, values: Any) -> OwnRows:
        """Look for the text, in its order, in the store's values (a ``ChunkedArray``), token by token.

        The store may lack the first tokens, or hold more than this text: other texts, or the whole of a shard.
        """
        if not len(label_N) or not len(values):
            return cls(None)
        if len(label_N) > len(values):
            skipped = len(label_N) - len(values)
            return cls(skipped if _stands_at(label_N[skipped:], 0, values) else None)
        for row in _places(label_N[:_BEGINNING], values):
            if _stands_at(label_N, row, values):
                return cls(-row)
        return cls(None)

    def drop(self, keep_NK: Array, id_NK: Array, first: int) -> Array:
        """Permissions without each token's own row.

        Args:
            first: number of the first of the N tokens.
        """
        if self.skipped is None:
            return keep_NK
        own_N = np.arange(first, first + len(id_NK)) - self.skipped
        return np.asarray(keep_NK & (id_NK != own_N[:, None]))


def export(
    retrieval: Retrieval,
    values: Any,
    path: str,
    *,
    k: int,
    temperature: float,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write the distribution at each token of a retrieval, in the order of the text; returns what the file says of it.

    A token is no neighbour of its own: where the store is of this very text, its row is left out.

    Args:
        values: of the datastore that was searched, a ``ChunkedArray``.
        path: of the Arrow stream, which is replaced when it is whole.
        k: neighbours that count.
        temperature: divides their scores.
        report: is given the tokens written so far.
    Raises: MissingExtraError without pyarrow.
    """
    from fairseq.runtime.atomic_files import replacing

    arrow, arrays, order_N = _arrow(), retrieval.arrays, retrieval.order
    label_N = np.asarray(arrays["target"])[order_N]
    own, entries = OwnRows.of(label_N, values), 0
    facts = {
        "format": FORMAT,
        "num_tokens": len(label_N),
        "k": k,
        "temperature": temperature,
        "own_rows_dropped": own.skipped is not None,
        "retrieval": {name: retrieval.fingerprint.get(name) for name in ("text_digest", "dictionary_digest", "subset")},
    }
    schema = arrow.schema(
        [
            ("id_cnt", arrow.int32()),
            ("token_id", arrow.list_(arrow.int32())),
            ("prob", arrow.list_(arrow.float16())),
            ("label", arrow.int32()),
        ],
        metadata={"fairseq-memory": json.dumps(facts)},
    )
    with replacing(path) as aside, arrow.OSFile(str(aside), "wb") as file, arrow.ipc.new_stream(file, schema) as stream:
        for first in range(0, len(label_N), _ROWS):
            row_R = order_N[first : first + _ROWS]
            score_RK, id_RK, value_RK = (np.asarray(arrays[name])[row_R, :k] for name in ("scores", "ids", "values"))
            keep_RK = own.drop(score_RK > -np.inf, id_RK, first)
            found = distributions(value_RK.astype(np.int32), score_RK, keep_RK, temperature)
            stream.write_batch(_record(arrow, schema, found, label_N[first : first + _ROWS]))
            entries += len(found.token_M)
            report(first + len(row_R))
    return facts | {"num_entries": entries, "bytes": os.path.getsize(path)}


def _record(arrow: Any, schema: Any, found: Distributions, label_R: Array) -> Any:
    offset = arrow.array(np.concatenate([[0], np.cumsum(found.count_N)]).astype(np.int32))
    columns = [
        arrow.array(found.count_N),
        arrow.ListArray.from_arrays(offset, arrow.array(found.token_M)),
        arrow.ListArray.from_arrays(offset, arrow.array(found.prob_M)),
        arrow.array(label_R.astype(np.int32)),
    ]
    return arrow.RecordBatch.from_arrays(columns, schema=schema)


class SoftTargets:
    """An opened file of distributions; it stays on disk, and rows are read as they are used.

    ```python
    targets = SoftTargets.open("train.arrow")
    token_NM, prob_NM = targets.rows(np.array([0, 1, 2]))
    ```
    """

    def __init__(self, path: str, batches: list[Any], facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self._columns = [{name: batch.column(name) for name in COLUMNS} for batch in batches]
        self._edges = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).astype(np.int64)

    @classmethod
    def open(cls, path: str) -> SoftTargets:
        """Map a stream of ours, or of any program with these columns.

        Raises: ValueError when it is missing, cut short or has other columns; MissingExtraError without pyarrow.
        """
        arrow = _arrow()
        if not os.path.isfile(path):
            raise ValueError(f"no file at {path!r}; fairseq-datastore export-knn-targets writes one")
        try:
            with arrow.ipc.open_stream(arrow.memory_map(path)) as stream:
                schema, batches = stream.schema, list(stream)
        except (arrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is no whole Arrow stream ({error}); export it again") from None
        types = {name: str(schema.field(name).type) if name in schema.names else "missing" for name in COLUMNS}
        wanted = dict(zip(COLUMNS, ("int32", "list<item: int32>", "list<item: halffloat>", "int32")))
        wrong = [name for name in COLUMNS if types[name].replace("element", "item") != wanted[name]]
        if wrong:
            name = wrong[0]
            raise ValueError(f"{path}: column {name!r} is {types[name]}, not {wanted[name]}; export it again")
        text = (schema.metadata or {}).get(b"fairseq-memory", b"{}")
        return cls(path, batches, json.loads(text))

    def __len__(self) -> int:
        return int(self._edges[-1])

    @cached_property
    def labels(self) -> Array:
        """The tokens of the text, int32 (N,)."""
        parts = [columns["label"].to_numpy() for columns in self._columns]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def rows(self, number_N: Array) -> tuple[Array, Array]:
        """Tokens (int64) and probabilities (float32) of some rows, (N, M), padded with token 0 and probability 0.

        Rows that follow each other are read together.
        """
        breaks = np.flatnonzero(np.diff(number_N) != 1) + 1
        runs = [run for part in np.split(np.asarray(number_N), breaks) if len(part) for run in self._runs(part)]
        counts = [count_R for count_R, _, _ in runs]
        count_N = np.concatenate(counts) if counts else np.empty(0, np.int64)
        width = int(count_N.max(initial=0))
        token_NM = np.zeros((len(count_N), width), np.int64)
        prob_NM = np.zeros((len(count_N), width), np.float32)
        held_NM = np.arange(width) < count_N[:, None]
        if len(runs):
            token_NM[held_NM] = np.concatenate([token for _, token, _ in runs])
            prob_NM[held_NM] = np.concatenate([prob for _, _, prob in runs])
        return token_NM, prob_NM

    def _runs(self, number_R: Array) -> Iterator[tuple[Array, Array, Array]]:
        """Counts, tokens and probabilities of consecutive rows, a record batch at a time."""
        first, end = int(number_R[0]), int(number_R[-1]) + 1
        if first < 0 or end > len(self):
            raise IndexError(f"rows {first} to {end - 1} of {len(self)}")
        batch = int(np.searchsorted(self._edges, first, side="right")) - 1
        while first < end:
            edge = int(self._edges[batch])
            start, stop = first - edge, min(end, int(self._edges[batch + 1])) - edge
            tokens, probs = (self._columns[batch][name].slice(start, stop - start) for name in ("token_id", "prob"))
            offset_R = tokens.offsets.to_numpy()
            yield np.diff(offset_R).astype(np.int64), tokens.flatten().to_numpy(), probs.flatten().to_numpy()
            first, batch = edge + stop, batch + 1
