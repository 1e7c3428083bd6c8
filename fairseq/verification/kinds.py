"""The kinds of files that can be verified: how each is recognised, and how its content is compared.

A check raises ValueError naming the file for damage, and returns a clause for the line that is printed otherwise.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq.runtime.files import read_json
from fairseq.runtime.records import is_sealed
from fairseq.runtime.tensor_files import is_tensor_file, read_tensor_file

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

Check = Callable[[Path], str]

_WHOLE = "every block is as it was saved"
_NO_SUMS = "its files fit together; it has no checksums (an earlier release or another program wrote it)"
_METRICS = ("l2", "ip", "cos")


def verify(kind: str, name: Path) -> str:
    """Compare the content of a path that ``recognised`` named; returns the outcome, a clause.

    Raises: ValueError naming the damaged file; OSError when it cannot be read.
    """
    return CHECKS[kind](name)


def recognised(path: Path) -> list[tuple[str, Path]]:
    """The kinds of what a path names, each with the name its check takes; none for what is not of this toolkit."""
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _of_file(path)
    found: list[tuple[str, Path]] = []
    if Path(f"{path}.idx").is_file():
        found.append(("binarised text", path))
    if Path(f"{path}.json").is_file():
        found.append(("datastore", path))
    indexes = [Path(f"{path}.{metric}") for metric in _METRICS]
    return found + [("index", index) for index in indexes if index.is_file()]


def _in_folder(folder: Path) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = [
        ("binarised text", index.with_suffix("")) for index in sorted(folder.glob("*.idx"))
    ]
    if (folder / "about.json").is_file():
        found.append(("bm25 index", folder))
    elif any(folder.glob("shard*.json")):
        found.append(("bm25 results", folder))
    return found


def _of_file(path: Path) -> list[tuple[str, Path]]:
    """By its ending where it has one of ours: the content may be damaged."""
    text = str(path)
    for ending in (".sums.json", ".bin", ".idx"):
        if text.endswith(ending):
            return [("binarised text", Path(text[: -len(ending)]))]
    if text.endswith(".json"):
        index = Path(text[:-5])
        return _of_file(index) if index.is_file() else [("datastore", index)]
    if text.endswith((".pt", ".pth", ".npz")):
        return [("clusters" if text.endswith(".npz") else "checkpoint", path)]
    if is_tensor_file(path):
        saved = read_tensor_file(path, "file of --save-retrieval or memory").metadata.get("format", "")
        return [("saved neighbours" if saved.startswith("fairseq-memory retrieval") else "memory", path)]
    if text.endswith(".safetensors"):
        return [("memory", path)]
    if zipfile.is_zipfile(path):
        return [("checkpoint", path)]
    has_metric = text.endswith(tuple(f".{metric}" for metric in _METRICS))
    return [("index", path)] if has_metric or Path(f"{path}.json").is_file() else []


def require_sealed(path: Path) -> None:
    """Raise ValueError for a JSON file that differs from its own checksum."""
    if path.is_file() and is_sealed(read_json(path)) is False:
        raise ValueError(f"{path} is damaged: it differs from its own checksum; copy it again, or save its data again")


def require_sealed_store(store: Datastore) -> None:
    """Raise ValueError for a JSON file of a store or of one of its shards that differs from its own checksum."""
    for name in {store.prefix, *(shard.prefix for shard in store.shards)}:
        require_sealed(Path(f"{name}.json"))


def _datastore(prefix: Path) -> str:
    from fairseq.memory.datastore.datastore import Datastore

    store = Datastore.open(prefix)
    require_sealed_store(store)
    store.verify()
    assert len(store.documents.runs_R3)
    return f"{len(store)} rows in {len(store.shards)} parts: {_WHOLE}"


def _index(path: Path) -> str:
    from fairseq.memory.index.faiss.file_marks import check_marks
    from fairseq.memory.index.faiss.index import FaissIndex, index_metadata
    from fairseq.memory.types import Metric

    metadata = index_metadata(path)
    require_sealed(Path(f"{path}.json"))
    check_marks(path, metadata, whole=True)
    ending = path.suffix[1:]
    metric = metadata.get("metric", ending if ending in _METRICS else "l2")
    rows = len(FaissIndex.open(path, Metric.parse(metric)))
    marks = metadata.get("files", {}).values()
    return f"{rows} rows: {_WHOLE if marks and all('blocks' in mark for mark in marks) else _NO_SUMS}"


def _clusters(path: Path) -> str:
    from fairseq.checkpoints.integrity import verify_archive
    from fairseq.memory.retomaton.clusters import Clusters

    if verify_archive(str(path)):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not {"cluster.npy", "format.npy"} & set(names):
            return f"{len(names)} arrays: every one is as it was saved"  # the scores of an evaluation
    return f"{len(Clusters.read(path))} clusters: {_WHOLE}"


def _neighbors(path: Path) -> str:
    from fairseq.memory.retrieval.file import Retrieval

    retrieval = Retrieval.open(path)
    retrieval.verify()
    return f"{len(retrieval)} tokens: {_WHOLE}"


def _memory(path: Path) -> str:
    from fairseq.memory.extended_mind.storage import load_memory, verify_memory

    has_sums = verify_memory(path)
    memory = load_memory(path)
    return f"{len(memory)} memories: {_WHOLE if has_sums else _NO_SUMS}"


def _bm25_index(folder: Path) -> str:
    from fairseq.data.bm25.index import verify_index

    require_sealed(folder / "about.json")
    return _WHOLE if verify_index(folder) else _NO_SUMS


def _bm25_results(folder: Path) -> str:
    from fairseq.data.bm25.results import read_results

    return f"neighbours of {len(read_results(folder))} segments: they fit together; they have no checksums"


def _text(prefix: Path) -> str:
    from fairseq.data.indexed_dataset import SUMS_ENDING, MMapIndexedDataset, require_undamaged

    data = MMapIndexedDataset(prefix)
    require_sealed(Path(f"{prefix}{SUMS_ENDING}"))
    has_sums = require_undamaged(str(prefix), whole=True)
    return f"{len(data)} sentences: {_WHOLE if has_sums else _NO_SUMS}"


def _checkpoint(path: Path) -> str:
    from fairseq.checkpoint_utils import load_checkpoint
    from fairseq.checkpoints.integrity import verify_archive

    has_sums = verify_archive(str(path))
    weights = load_checkpoint(str(path)).model
    return f"{len(weights)} weights: {_WHOLE if has_sums else _NO_SUMS}"


# A kind of file: the check, which takes the path that recognised() yields.
CHECKS: Mapping[str, Check] = {
    "datastore": _datastore,
    "index": _index,
    "clusters": _clusters,
    "saved neighbours": _neighbors,
    "memory": _memory,
    "bm25 index": _bm25_index,
    "bm25 results": _bm25_results,
    "binarised text": _text,
    "checkpoint": _checkpoint,
}
