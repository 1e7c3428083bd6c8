"""The formulas of kNN-LM and TRIME in float64, over what an explanation holds."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def packed(content: dict[str, Any]) -> Array:
    """A packed array, as docs/explorer.md describes it."""
    array = np.frombuffer(base64.b64decode(content["data"]), np.dtype(content["dtype"]).newbyteorder("<"))
    array = array.reshape(content["shape"])
    return array.astype(np.float64) if content["dtype"] == "float32" else array.astype(np.int64)


def column(explanation: Any, name: str) -> Array:
    """A column of all tokens."""
    return packed(explanation.tokens(slice(0, len(explanation.table)), text=False)["columns"][name])


def knn_logp(scores_NK: Array, values_NK: Array, token_N: Array, *, normalise: bool = True) -> Array:
    """ln of the softmax's share of the candidates that hold the token (or of their sum alone)."""
    with np.errstate(divide="ignore"):
        hit_N = np.logaddexp.reduce(np.where(values_NK == token_N[:, None], scores_NK, -np.inf), 1)
    return hit_N - np.logaddexp.reduce(scores_NK, 1) if normalise else hit_N


def joint_logp(lm_N: Array, norm_N: Array, sums: list[tuple[Array, Array]]) -> Array:
    """ln p where vocabulary and memories are normalised together (arXiv 2205.12674, sec. 3)."""
    above_N, below_N = lm_N + norm_N, norm_N
    for hit_N, whole_N in sums:
        above_N, below_N = np.logaddexp(above_N, hit_N), np.logaddexp(below_N, whole_N)
    return above_N - below_N


def check_schema(explanation: Any) -> dict[str, Any]:
    """Fail unless an export conforms to the schema; returns it."""
    from fairseq.explorer.export import export
    from fairseq.explorer.schema import COLUMNS, EXPLANATION
    from fairseq.runtime.records import require

    content: dict[str, Any] = json.loads(export(explanation, slice(0, min(8, len(explanation.table)))))
    require(content, EXPLANATION, "the export")
    assert content["tokens"]["columns"].keys() >= COLUMNS
    return content
