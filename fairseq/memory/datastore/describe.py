"""The one place that decides what a user's PREFIX means: our own store, or arrays of another program.

If it means neither, the error names what exists, what is missing and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.memory.datastore.config import SAVES_EITHER
from fairseq.memory.datastore.foreign_formats import ForeignFiles, in_hdf5
from fairseq.memory.datastore.layout import KEY_DTYPES, PROGRESS, StoreFiles
from fairseq.memory.datastore.metadata import read_metadata, saved_shards
from fairseq.runtime.records import read_record


@dataclass(frozen=True)
class StoreHints:
    """Facts that the user states about a store; arrays of other programs need those that their files lack.

    ```python
    key_ND.numpy().tofile("old_keys.npy")  # headerless, as kNN-LM and TRIME write them
    token_N.numpy().tofile("old_vals.npy")
    old = Datastore.open("old", StoreHints(dim=16))
    ```
    """

    dim: int | None = None
    """Width of the keys."""
    size: int | None = None
    """Rows; by default those that the byte counts make."""
    fp16: bool = False
    """The keys are float16: TRIME's names and int64 values, or kNN-LM's names and int16 values."""
    bf16: bool = False
    """The keys are bfloat16."""
    saved_by: str = SAVES_EITHER
    """Command that makes such a store, for messages."""

    @property
    def key_dtype(self) -> str:
        """Type of the keys as stated, float32 by default."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


@dataclass(frozen=True)
class StoreDescription:
    """A store that was found: its metadata, or the foreign files that make it up."""

    prefix: str
    hints: StoreHints
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Content of ``<prefix>.json``; empty for foreign files."""
    foreign: ForeignFiles | None = None
    """Arrays of another program; None for our own store."""


def describe(prefix: str | Path, hints: StoreHints | None = None, *, with_keys: bool = True) -> StoreDescription:
    """Find the store that a prefix (or the folder of another program's store) means. Opens no array.

    Args:
        hints: facts about arrays of other programs; None accepts only a store that describes itself.
        with_keys: False accepts foreign values without keys; size and width must then be stated.
    Raises: ValueError with the fix when nothing fits, or our own store has another key type than stated.
    """
    stated = hints or StoreHints()
    if StoreFiles.of(prefix).metadata.exists():
        metadata = read_metadata(prefix)
        _require_stated_type(prefix, metadata["key_dtype"], stated)
        return StoreDescription(str(prefix), stated, metadata=metadata)
    if hints is None:
        raise ValueError(_why_not_opened(prefix, SAVES_EITHER))
    # Sizes in the names or headers are looked for under the stated type, as the files of that type are named.
    files = ForeignFiles.find(prefix, stated.key_dtype)
    if stated.dim is None and not files.state_their_sizes:
        raise ValueError(_why_not_opened(prefix, stated.saved_by))
    if with_keys:
        is_complete = files.present()
    else:
        is_complete = files.values.exists() and stated.size is not None and stated.dim is not None
    if not is_complete:
        raise ValueError(_why_not_opened(prefix, stated.saved_by))
    return StoreDescription(str(prefix), stated, foreign=files)


def require_some_store(prefix: str | Path, saved_by: str) -> None:
    """Raise ValueError where no file of any store is, complete or not, before anything is loaded for its sake."""
    names = [StoreFiles.of(prefix, dtype) for dtype in KEY_DTYPES]
    files = [names[0].metadata, names[0].progress, names[0].values, *(each.keys for each in names)]
    if not any(path.exists() for path in files) and not saved_shards(prefix) and not Path(prefix).is_dir():
        raise ValueError(_nothing_there(prefix, saved_by))


def _require_stated_type(prefix: str | Path, dtype: str, stated: StoreHints) -> None:
    for flag, expected, given in (("fp16", "float16", stated.fp16), ("bf16", "bfloat16", stated.bf16)):
        if given and dtype != expected:
            raise ValueError(
                f"datastore {str(prefix)!r} holds {dtype} keys and --dstore-{flag} was given; drop the flag"
            )


def _nothing_there(prefix: str | Path, saved_by: str) -> str:
    files = StoreFiles.of(prefix)
    return (
        f"no datastore at {str(prefix)!r}: neither {files.metadata} nor {files.keys} exists; save one with {saved_by}"
    )


def _why_not_opened(prefix: str | Path, saved_by: str) -> str:
    """The reason why a store cannot be opened by its metadata, with the fix."""
    existing = [names for names in (StoreFiles.of(prefix, dtype) for dtype in KEY_DTYPES) if names.keys.exists()]
    saved = saved_shards(prefix)
    if saved and not existing:
        return _why_not_joined(str(prefix), saved)
    progress = StoreFiles.of(prefix).progress
    if progress.exists():
        state = read_record(progress, PROGRESS)
        rows, of = state["rows_done"], state["signature"]["rows"] or "?"
        return f"datastore {str(prefix)!r} is not complete ({rows} of {of} rows); resume with the same command"
    if existing and not existing[0].values.exists():
        return (
            f"datastore {str(prefix)!r} is not complete: {existing[0].keys} exists, {existing[0].values} does not; "
            "copy it too, or save the store again"
        )
    if existing or ForeignFiles.find(prefix, "float32").present():
        names = str(existing[0].keys if existing else ForeignFiles.find(prefix, "float32").keys)
        return (
            f"{names} has no metadata ({StoreFiles.of(prefix).metadata}) and its type or size is not as stated; give "
            "files of the original programs their --dstore-size (build_dstore.py: --dimension too), and --dstore-fp16 "
            "if they hold float16, or convert them with fairseq-datastore convert to a store that needs no flags"
        )
    if in_hdf5(Path(prefix)):
        return (
            f"{str(prefix)!r} is a store of knn-seq, in HDF5, which is not read here: write its data sets 'memory' and "
            "'tokens' (h5py reads them) as keys.npy (float16 or float32) and vals.npy (int64) into another folder"
        )
    return _nothing_there(prefix, saved_by)


def _why_not_joined(prefix: str, saved: Mapping[int, set[int]]) -> str:
    """The reason for a store of which only shards exist, with the fix."""
    count = max(saved, key=lambda count: len(saved[count]))
    missing = sorted(set(range(count)) - saved[count])
    if not missing:
        return f"datastore {prefix!r} consists of {count} shards; join them with fairseq-datastore merge {prefix}"
    return (
        f"datastore {prefix!r} is not complete: of its {count} shards {', '.join(map(str, missing))} are not saved; "
        "run the same command with the --shard-id of each"
    )
