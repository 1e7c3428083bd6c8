"""The JSON file beside an index, and the marks in it that detect an exchanged or damaged index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq.runtime.file_marks import MARK, differs
from fairseq.runtime.records import (
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    WHOLE,
    Entries,
    Fields,
    Items,
    Nullable,
    one_of,
)

WAY_OUT = "copy it again, or rebuild the index with build_dstore.py"
_STORE = Fields({}, {"digest": Nullable(TEXT), "rows": WHOLE, "dim": POSITIVE, "key_dtype": TEXT})
_PROBE = Fields({"probe": WHOLE, "recall": NUMBER, "queries_per_second": NUMBER})
_FIGURES = {"k": WHOLE, "queries": WHOLE, "held_back": FLAG, "bytes_per_key": NUMBER, "build_seconds": NUMBER}
_REPORT = Fields({}, {"asked": OBJECT, **_FIGURES, "probes": Items(_PROBE)})
SIGNATURE = Fields({}, {"store": _STORE, "factory": TEXT, "metric": TEXT})
"""What a build's content depends on."""
INDEX = Fields(
    {},
    {
        "rows": WHOLE,
        "dim": POSITIVE,
        "metric": one_of("l2", "ip", "cos"),
        "files": Entries(MARK),
        "signature": SIGNATURE,
        "left_out": Items(WHOLE),
        "train_seconds": NUMBER,
        "add_seconds": NUMBER,
        "report": _REPORT,
    },
)
"""``<index>.json``."""


def check_marks(index: Path, metadata: Mapping[str, Any], *, whole: bool = False) -> None:
    """Raise ValueError when a file is not the one that was described.

    Args:
        whole: compare every block; otherwise those of a file of at most 64 MiB, and the ends of a longer one.
    """
    for ending, mark in metadata.get("files", {}).items():
        path = Path(f"{index}{ending}")
        if not path.exists():
            raise ValueError(f"{path} is missing: it holds the lists of {index}; copy it too, or rebuild the index")
        difference = differs(path, mark, whole=whole)
        if difference is not None:
            raise ValueError(
                f"{path} is not the file that {index}.json describes ({difference}): it is cut short, damaged or "
                "another index's; copy both again, or rebuild it with build_dstore.py"
            )
