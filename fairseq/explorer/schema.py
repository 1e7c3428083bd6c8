"""The schema of an exported explanation, as other programs read it (``docs/explorer.md`` describes it)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fairseq.explorer.explanation import FORMAT, VERSION
from fairseq.explorer.packing import TYPES, unpack
from fairseq.runtime.records import (
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Entries,
    Fields,
    Items,
    Nullable,
    Scalar,
    one_of,
    read_record,
    whole,
)

_ANY_WHOLE = whole(-1, 2**63 - 1)
_LINE = Scalar("a text", lambda value: isinstance(value, str))  # a token may be any character, NUL too
PACKED = Fields({"dtype": one_of(*TYPES), "shape": Items(WHOLE, at_least=1), "data": TEXT})
"""An array: ``packing.py``."""
SETTING = Fields(
    {"k": Nullable(WHOLE), **{name: Nullable(NUMBER) for name in ("lmbda", "temperature", "joint_temperature")}}
)
RULE = Fields(
    {
        "kind": one_of("interpolation", "joint", "given"),
        "dim": WHOLE,
        "with_external": FLAG,
        "only_where_found": FLAG,
    }
)
ABOUT = Fields(
    {
        "format": one_of(FORMAT),
        "version": one_of(VERSION),
        "kind": one_of("knn", "retomaton", "trime", "translation", "extended-mind"),
        "title": _LINE,
        **{name: WHOLE for name in ("num_tokens", "num_ready", "k", "first", "longest")},
        **{name: FLAG for name in ("failed", "working", "reads")},
        "separator": _LINE,
        "rule": RULE,
        "setting": SETTING,
        "metric": one_of("l2", "ip", "cos"),
        "unit": TEXT,
        "sources": Items(TEXT),
        "notes": Items(TEXT),
        "facts": Entries(_LINE),
    }
)
TOKENS = Fields({"first": WHOLE, "columns": Entries(PACKED), "text": Items(_LINE)})
CANDIDATES = Fields({"first": WHOLE, "scores": PACKED, "values": PACKED})
NEIGHBOR = Fields(
    {
        **{name: _ANY_WHOLE for name in ("place", "row", "document", "offset", "value")},
        **{name: FLAG for name in ("agrees", "deleted")},
        **{name: Items(_LINE) for name in ("before", "after")},
        "text": _LINE,
        "score": NUMBER,
    },
    {"source": _LINE},
)
DISTRIBUTION = Fields({"token": PACKED, "logp": PACKED})
_ATTENDED = Fields({"document": WHOLE, "place": WHOLE, "text": _LINE, "weight": NUMBER})
_CITED = Fields({**{name: WHOLE for name in ("document", "start", "stop")}, "weight": NUMBER, "text": _LINE})
ATTENTION = Fields(
    {
        "layers": Items(Fields({"layer": WHOLE, "share": NUMBER, "tokens": Items(_ATTENDED)})),
        "citations": Items(_CITED),
    }
)
SENTENCE = Fields(
    {"number": _ANY_WHOLE, "source": _LINE, "beams": Items(Fields({"score": NUMBER, "text": _LINE}))},
    {"reference": _LINE, "pairs": Items(Fields({"source": _LINE, "target": _LINE}))},
)
LOCAL = Fields({"text": _LINE, "before": Items(_LINE), "weight": NUMBER, "back": WHOLE, "agrees": FLAG})
DETAILS = Fields(
    {"at": WHOLE, "words": Entries(_LINE)},
    {
        "neighbors": Items(NEIGHBOR),
        "lm": DISTRIBUTION,
        "mixed": DISTRIBUTION,
        "attention": ATTENTION,
        "sentence": SENTENCE,
        "local": Items(LOCAL),
        "local_candidates": Fields({"scores": PACKED, "values": PACKED}),
    },
)
EXPLANATION = Fields({"about": ABOUT, "tokens": TOKENS, "candidates": Nullable(CANDIDATES), "details": Items(DETAILS)})
COLUMNS = frozenset("token block document lm norm memory mixed counted nearest frequency".split())
"""Columns that every explanation has."""


def read_explanation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an exported JSON file, with NumPy arrays for packed ones.

    Raises: ValueError naming the file and the first entry that is wrong; OSError when it cannot be read.

    ```python
    explanation = read_explanation("explanation.json")
    explanation["tokens"]["columns"]["mixed"]  # ln p of each token, float32
    ```
    """
    content = read_record(Path(path), EXPLANATION, "export it again")
    missing = COLUMNS - content["tokens"]["columns"].keys()
    if missing:
        raise ValueError(f"{path} is damaged: it lacks the column {min(missing)!r}; export it again")
    unpacked: dict[str, Any] = _unpacked(content)
    return unpacked


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "shape", "data"}:
        return unpack(value)
    return {name: _unpacked(entry) for name, entry in value.items()}
