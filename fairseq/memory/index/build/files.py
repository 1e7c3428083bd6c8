"""The files of an index in the making, and what they say about how far it is."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.faiss.file_marks import SIGNATURE
from fairseq.memory.index.faiss.index import index_metadata
from fairseq.runtime.files import write_json
from fairseq.runtime.records import NUMBER, WHOLE, Fields, read_record

logger = logging.getLogger(__name__)

_STEP = Fields({"signature": SIGNATURE}, {"seconds": NUMBER})
_ROWS_DONE = Fields({**_STEP.required, "rows_done": WHOLE, "code_bytes": WHOLE}, _STEP.optional)


@dataclasses.dataclass(frozen=True)
class BuildFiles:
    """The names a build uses; all but the first three are gone when it has ended."""

    index: Path
    metadata: Path
    lists: Path
    """The lists of an index whose lists are kept on disk."""
    trained: Path
    trained_metadata: Path
    codes: Path
    """Codes of one part's rows; of a kind without codes the index so far."""
    progress: Path
    lock: Path
    """Of one part."""
    joining_lock: Path

    @classmethod
    def of(cls, config: BuildConfig, shard_id: int | None = None) -> BuildFiles:
        """The names for a config, of its part or another."""
        name = f"{config.faiss_index}.{config.dist}"
        shard_id = config.shard_id if shard_id is None else shard_id
        part = f".part{shard_id}-of-{config.num_shards}" if config.num_shards > 1 else ""
        ends = ["", ".json", ".ivfdata", ".trained", ".trained.json"]
        ends += [f"{part}.codes.tmp", f"{part}.progress.json", f"{part}.lock", ".joining.lock"]
        return cls(*(Path(name + end) for end in ends))

    def remove_unfinished(self) -> None:
        """Remove what is not the finished index."""
        for path in (self.codes, self.progress):
            path.unlink(missing_ok=True)

    def remove_trained(self) -> None:
        """Remove the trained, empty index."""
        for path in (self.trained_metadata, self.trained):
            path.unlink(missing_ok=True)


def signature_of(config: BuildConfig, store: Datastore) -> dict[str, Any]:
    """Everything that the content of the index depends on: builds of equal signature resume one another."""
    metadata: dict[str, Any] = {"factory": config.factory(store.dim), "metric": config.dist, "seed": config.seed}
    metadata["train_size"] = config.train_size
    metadata |= {name: True for name in ("drop_nonfinite", "on_disk") if getattr(config, name)}
    kept = {"rows": len(store), "dim": store.dim, "key_dtype": store.keys.dtype, "digest": store.digest}
    if kept["digest"] is None:
        kept["modified"] = [os.stat(path).st_mtime for path in store.keys.files]
    return metadata | {"store": kept}


def is_complete(files: BuildFiles, signature: Mapping[str, Any]) -> bool:
    """True if the index is complete."""
    return files.index.exists() and index_metadata(files.index).get("signature") == signature


def rows_done(files: BuildFiles, signature: Mapping[str, Any]) -> int:
    """Rows of a part that an interrupted build of the same index has done."""
    if not files.progress.exists():
        return 0
    state = read_record(files.progress, _ROWS_DONE)
    if state["signature"] != signature:
        return 0
    if not files.codes.exists():
        return 0
    if files.codes.stat().st_size < state["rows_done"] * state["code_bytes"]:
        logger.warning("%s is shorter than its progress file says; encoding again", files.codes)
        return 0
    return int(state["rows_done"])


def remove_leftovers_of_another(files: BuildFiles, signature: Mapping[str, Any]) -> None:
    """Remove an interrupted build of another index under the same names."""
    if files.progress.exists() and read_record(files.progress, _STEP)["signature"] != signature:
        logger.warning("%s: another command left an unfinished build; it is removed", files.index)
        files.remove_unfinished()


def require_one_build(files: BuildFiles, signature: Mapping[str, Any]) -> None:
    """Raise ValueError with both values where the parts beside this one are of another build."""
    other = read_record(files.trained_metadata, _STEP)["signature"] if files.trained_metadata.exists() else signature
    for name in (other.keys() | signature.keys()) - {"store"}:
        if other.get(name) != signature.get(name):
            raise ValueError(
                f"{files.trained} is of parts with {name} {other.get(name)!r}, this one has {signature.get(name)!r}: "
                "give the same flags to all parts, or remove the others' files"
            )
    if other != signature:
        raise ValueError(
            f"{files.trained} is of parts over other keys: the datastore was saved again since, or it is another one; "
            "remove their files and build all parts again"
        )


def is_trained(files: BuildFiles, signature: Mapping[str, Any]) -> bool:
    """True if the trained, empty index of this build exists."""
    return (
        files.trained.exists()
        and files.trained_metadata.exists()
        and read_record(files.trained_metadata, _STEP)["signature"] == signature
    )


def record(files: BuildFiles, signature: Mapping[str, Any], **more: object) -> None:
    """Write how far a part is."""
    write_json(files.progress, {"signature": signature, **more})


def seconds_spent(path: Path) -> float:
    """Seconds that earlier commands spent on the same step, by its file."""
    return float(read_record(path, _STEP).get("seconds", 0.0)) if path.exists() else 0.0
