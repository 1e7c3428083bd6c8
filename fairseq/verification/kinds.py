"""The kinds of files that can be verified, and how the content of each is compared.

A check raises ValueError naming the file for damage, and returns a clause for the line that is printed otherwise.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq.runtime.files import read_json
from fairseq.runtime.records import is_sealed
from fairseq.verification.recognition import METRICS

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

Check = Callable[[Path], str]

_WHOLE = "every block is as it was saved"
_NO_SUMS = "its files fit together; it has no checksums (an earlier release or another program wrote it)"


def verify(kind: str, name: Path) -> str:
    """Compare the content of a path that ``recognised`` named; returns the outcome, a clause.

    Raises: ValueError naming the damaged file; OSError when it cannot be read.
    """
    return CHECKS[kind](name)


def require_sealed(path: Path) -> None:
    """Raise ValueError for a JSON file that is missing, or differs from its own checksum."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it again, or save its data again")
    if is_sealed(read_json(path)) is False:
        raise ValueError(f"{path} is damaged: it differs from its own checksum; copy it again, or save its data again")


def require_sealed_store(store: Datastore) -> None:
    """Raise ValueError for a JSON file of a store or of one of its shards that differs from its own checksum."""
    from fairseq.memory.datastore.layout import StoreFiles

    for name in dict.fromkeys([store.prefix, *(shard.prefix for shard in store.shards)]):
        require_sealed(StoreFiles.of(name).metadata)


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
    if metadata:
        require_sealed(Path(f"{path}.json"))
    check_marks(path, metadata, whole=True)
    ending = path.suffix[1:]
    metric = metadata.get("metric", ending if ending in METRICS else "l2")
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


def _rows(path: Path) -> str:
    """Rows of GNN-LM: neighbours, states or codes; a codec beside codes is compared with what they were made with."""
    from fairseq.memory.gnn.codec import ProductQuantizer
    from fairseq.memory.gnn.row_file import RowFile

    file = RowFile.open(path)
    file.verify()
    codec = Path(f"{path}.codec")
    outcome = f"{len(file)} rows of {file.made_of.get('kind', 'another program')}: {_WHOLE}"
    made_with = file.made_of.get("codec")
    if made_with is None:
        return outcome
    if not codec.exists():
        return f"{outcome}; there is no {codec.name} beside them to compare"
    if ProductQuantizer.load(codec)[0].digest != made_with:
        raise ValueError(
            f"{codec} is not the codec that the codes in {path} were made with ({str(made_with)[:12]}); copy that one"
        )
    return f"{outcome}, and made with {codec.name}"


def _codec(path: Path) -> str:
    from fairseq.memory.gnn.codec import ProductQuantizer

    codec, _ = ProductQuantizer.load(path)
    return f"{codec.num_bytes} bytes for a width of {codec.dim}: it is as it was saved"


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
    from fairseq.data.indexed_dataset import MMapIndexedDataset, require_undamaged

    data = MMapIndexedDataset(prefix)
    has_sums = require_undamaged(str(prefix), whole=True)
    return f"{len(data)} sentences: {_WHOLE if has_sums else _NO_SUMS}"


def _dictionary(path: Path) -> str:
    from fairseq.data.dictionary import Dictionary

    return f"{len(Dictionary.load(path))} types: it can be read; it has no checksum"


def _manifest(path: Path) -> str:
    content = read_json(path, "copy it again, or run its command again")
    if "command" not in content:
        raise ValueError(f"{path} is damaged or of another program: it records no command; copy it again")
    return "it can be read; it has no checksum"


def _combiner(path: Path) -> str:
    from fairseq.memory.combiners.learned_files import load_combiner

    network, made_for = load_combiner(path)
    return f"{made_for.kind}, {len(list(network.parameters()))} weights: {_WHOLE}"


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
    "rows": _rows,
    "codec": _codec,
    "memory": _memory,
    "bm25 index": _bm25_index,
    "bm25 results": _bm25_results,
    "binarised text": _text,
    "dictionary": _dictionary,
    "combiner": _combiner,
    "run manifest": _manifest,
    "checkpoint": _checkpoint,
}
