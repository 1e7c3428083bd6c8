"""Rows of a store as clients see them: text around the row, document, distance and weight.

Shapes: M rows, C tokens of a context.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fairseq.hf.decoding.mixing import Found
from fairseq.memory.datastore.datastore import Datastore
from fairseq.serving.texts import Codec

CONTEXT = 16
"""Tokens shown on either side, where a request states no number."""


def describe_rows(
    store: Datastore, codec: Codec, rows_M: Tensor, scores_M: Tensor, weights_M: Tensor | None, context: int = CONTEXT
) -> list[dict[str, Any]]:
    """Facts about rows, in their order.

    ``document`` is null for a store that does not record documents; ``offset`` is then the number of the row.
    ``distance`` is minus the score: the squared Euclidean distance, or minus the inner product.
    """
    if not len(rows_M):
        return []
    token_MC = store.context(rows_M, before=context, after=context)
    document_M, offset_M = store.where(rows_M)
    found = []
    for n in range(len(rows_M)):
        ids = token_MC[n].tolist()
        before, token, after = ids[:context], ids[context], ids[context + 1 :]
        facts = {
            "row": int(rows_M[n]),
            "document": int(document_M[n]) if store.has_documents else None,
            "offset": int(offset_M[n]),
            "token": _text(codec, [token]),
            "token_id": token,
            "before": _text(codec, before),
            "after": _text(codec, after),
            "distance": -float(scores_M[n]),
        }
        found.append(facts if weights_M is None else facts | {"weight": float(weights_M[n])})
    return found


def describe_found(store: Datastore, codec: Codec, found: Found | None) -> list[dict[str, Any]]:
    """The candidates of a position."""
    if found is None:
        return []
    return describe_rows(store, codec, found.rows_M, found.scores_M, found.weights_M)


def _text(codec: Codec, ids: list[int]) -> Any:
    """Tokens as text, or their ids where there is no tokenizer; -1 stands for no token."""
    there = [token for token in ids if token >= 0]
    return there if codec.tokenizer is None else codec.decode(there, special=True)
