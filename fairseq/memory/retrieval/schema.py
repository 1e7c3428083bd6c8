"""Schemas of a file of saved neighbours and of its progress."""

from __future__ import annotations

from collections.abc import Mapping

from fairseq.runtime.records import (
    CRC,
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    SUMS,
    TEXT,
    WHOLE,
    Entries,
    Fields,
    Items,
)

TYPES: Mapping[str, tuple[str, ...]] = {
    "block": ("I64",),
    "target": ("I32",),
    "continues": ("BOOL",),
    "lm_logp": ("F32",),
    "lm_norm": ("F32",),
    "ids": ("I32", "I64"),
    "values": ("U16", "I32"),
    "scores": ("F32",),
}
"""The arrays that every file holds, and their types."""
TEXT_SUMS: Mapping[str, tuple[str, ...]] = {"near_hit": ("F32",), "near_whole": ("F32",)}
"""Those of a file with sums of memories of the text; both or none."""
WIDE = frozenset({"ids", "values", "scores"})
"""Arrays of a column per neighbour."""

CHECKSUMS = Entries(Items(CRC))
PROGRESS = Fields({"signature": OBJECT, "rows_done": WHOLE, "num_tokens": WHOLE, "checksums": Entries(SUMS)})

MADE_OF = Fields(
    {"joint": FLAG, "text_digest": TEXT, "shard": Items(WHOLE, at_least=2), "dim": POSITIVE},
    {"softmax_temp": NUMBER},
)
"""What a sweep reads of ``made_of``."""
ABOUT = Fields(
    {"temperature": NUMBER, "program": TEXT},
    {
        "store": Fields({"prefix": TEXT}, {"described": FLAG}),
        "dictionary": TEXT,
        "path": TEXT,
    },
)
"""What a sweep reads of ``about``."""
EXPLAINED_MADE_OF = Fields({"store_digest": TEXT, "store_rows": WHOLE})
EXPLAINED_ABOUT = Fields({"store": Fields({"prefix": TEXT, "described": FLAG})})
"""What explaining a sweep reads beside."""
JOINT_ABOUT = Fields(ABOUT.required, {**ABOUT.optional, "interp_temp": NUMBER, "mode": TEXT})
"""The same of an evaluation that normalised memory and vocabulary together, and may have interpolated on top."""
