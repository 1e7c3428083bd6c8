"""Recognises what a path names, by the names and first bytes of files: either may be damaged, seldom both."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from fairseq.runtime.tensor_files import is_tensor_file, read_tensor_file

METRICS = ("l2", "ip", "cos")
Found = list[tuple[str, Path]]
"""Kinds, each with the name its check takes."""

_HEAD_BYTES = 64 << 10  # our JSON files say within a few KB what they are; a segments file of bm25 has GBs
_STORE_WORDS = (b'"format_version"', b'"key_dtype"', b'"value_dtype"')
_INDEX_WORDS = (b'"signature"', b'"metric"', b'"factory"')
_ROW_WORDS = (b'"made_of"', b'"dtype"', b'"width"')
_SHARD = re.compile(r"\.shard\d+of\d+\.json$")
_DICTIONARY = re.compile(r"dict(\.[\w-]+)?\.txt")
# Files that belong to another one, or to a command that runs or was stopped.
_SIDE_FILES = (".lock", ".tmp", ".progress.json", ".ivfdata", ".trained", ".trained.json", ".centroids.npy", ".partial")


def recognised(path: str | Path) -> Found:
    """The kinds of what a path names; none for what is not of this toolkit.

    A name without a slash at its end may mean a prefix and a folder: then both are looked at.
    """
    name, found = Path(path), [] if str(path).endswith("/") else _of_prefix(Path(path))
    if name.is_dir():
        found += contents(name).found
    elif name.is_file():
        found = _of_file(name)
    return list(dict.fromkeys(found))


@dataclass
class Contents:
    """What lies in a folder, its folders not included."""

    found: Found = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Files that nothing compares."""


def contents(folder: Path) -> Contents:
    """Everything that can be verified in a folder, and the files that cannot."""
    held = Contents()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    about = _head(folder / "about.json")
    is_bm25 = b'"num_segments"' in about or b'"sha256"' in about
    shards = [path for path in files if re.fullmatch(r"shard\d+\.json", path.name) and _is_bm25_shard(path)]
    if is_bm25:
        held.found.append(("bm25 index", folder))
    if shards:
        held.found.append(("bm25 results", folder))
    for path in files:
        if path in shards or (shards and path.name == "search.json") or (is_bm25 and _is_bm25_file(path)):
            continue
        kinds = _of_file(path, named=False)
        held.found += kinds
        if not kinds and not path.name.endswith(_SIDE_FILES):
            held.unknown.append(path.name)
    held.found = _without_shards(list(dict.fromkeys(held.found)))
    return held


def _is_bm25_shard(path: Path) -> bool:
    """True for neighbours of segments: of a search that is recorded, or by the first bytes."""
    return path.with_name("search.json").is_file() or bool(re.match(rb'\{\s*"\d+": \[', _head(path)))


def _is_bm25_file(path: Path) -> bool:
    return path.name == "about.json" or ".index." in path.name


def _without_shards(found: Found) -> Found:
    """Leave out the shards of stores that are verified as a whole: damage is reported once."""
    from fairseq.memory.datastore.metadata import read_metadata, read_shards

    parts: set[str] = set()
    for kind, name in found:
        if kind == "datastore":
            try:
                shards = read_shards(name, read_metadata(name))
            except (ValueError, OSError):
                continue
            parts |= {_metadata(shard.prefix) for shard in shards if _metadata(shard.prefix) != _metadata(name)}
    return [(kind, name) for kind, name in found if kind != "datastore" or _metadata(name) not in parts]


def _metadata(prefix: str | Path) -> str:
    from fairseq.memory.datastore.layout import StoreFiles

    return os.path.realpath(StoreFiles.of(prefix).metadata)


def _of_prefix(prefix: Path) -> Found:
    found: Found = []
    if prefix.name in ("", "..") or prefix.is_file():
        return found
    if Path(f"{prefix}.idx").is_file():
        found.append(("binarised text", prefix))
    if Path(f"{prefix}.json").is_file():
        found += _of_json(Path(f"{prefix}.json"), named=True)
    for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.shard*of*.json")):
        found += [("rows", path.with_suffix(""))] if _SHARD.search(path.name) and _is_rows(path.with_suffix("")) else []
    for ending in METRICS:
        found += [("index", path)] if (path := Path(f"{prefix}.{ending}")).is_file() else []
    clusters = Path(f"{prefix}.clusters.npz")
    return [*found, ("clusters", clusters)] if clusters.is_file() else found


def _of_file(path: Path, *, named: bool = True) -> Found:
    """By its ending where it has one of ours: the content may be damaged.

    Args:
        named: the user named the file, so that it may be anything of ours that is damaged; otherwise it was met in a
            folder, where files of other programs may lie.
    """
    from fairseq.memory.datastore.layout import store_of_file

    if _is_rows(path):
        return [("rows", path)]
    text = str(path)
    for ending in (".sums.json", ".bin", ".idx"):
        prefix = text.removesuffix(ending)
        if prefix != text and (named or any(os.path.exists(prefix + end) for end in (".sums.json", ".idx"))):
            return [("binarised text", Path(prefix))]
    if store_of_file(path) is not None and (path.suffix == ".npy" or path.name == "datastore.json"):
        return [("datastore", _store_path(path))]
    if path.name.endswith(_SIDE_FILES) and not named:
        return _unfinished_store(path)
    if path.suffix == ".json":
        return _of_json(path, named=named)
    if _DICTIONARY.fullmatch(path.name):
        return [("dictionary", path)]
    if path.suffix in (".pt", ".pth", ".npz"):
        return [("clusters" if path.suffix == ".npz" else "checkpoint", path)]
    if path.suffix == ".codec" and (named or is_tensor_file(path) or _is_rows(path.with_suffix(""))):
        return [("codec", path)]
    if _is_index(path, named=named):
        return [("index", path)]
    if is_tensor_file(path) or path.suffix == ".safetensors":
        return _of_tensors(path)
    return [("checkpoint", path)] if named and _is_archive(path) else []


def _store_path(file: Path) -> Path:
    """The name of the store of a file; in a folder FOLDER/datastore, which keeps its meaning without a slash."""
    from fairseq.memory.datastore.layout import StoreName, store_of_file

    return StoreName.of(str(store_of_file(file))).stem


def _unfinished_store(path: Path) -> Found:
    """A store that is being saved, or whose saving was stopped: its check says so."""
    if not path.name.endswith(".progress.json"):
        return []
    stem = Path(str(path).removesuffix(".progress.json"))
    arrays = (f"{stem}_vals.npy.tmp", stem.with_name("vals.npy.tmp") if stem.name == "datastore" else "")
    is_store = any(array and os.path.exists(array) for array in arrays)
    return [("datastore", stem)] if is_store and not Path(f"{stem}.json").exists() else []


def _of_json(path: Path, *, named: bool) -> Found:
    from fairseq.memory.datastore.layout import store_of_file

    stem, head = path.with_suffix(""), _head(path)
    if path.name.endswith(".run.json"):
        return [("run manifest", path)]
    if stem.is_file():  # beside an index
        return _of_file(stem, named=named)
    if _is_rows(stem):  # its array is gone
        return [("rows", stem)]
    weights = path.with_suffix(".safetensors")
    if _is_combiner(weights):
        return [("combiner", weights)]
    arrays = (Path(f"{stem}{end}") for end in ("_keys.npy", "-fp16_keys.npy", "-bf16_keys.npy", "_vals.npy"))
    if any(word in head for word in _STORE_WORDS) or any(a.exists() and store_of_file(a) for a in arrays):
        return [("datastore", stem)]
    # What is no JSON may have been anything.
    return [("datastore", stem)] if len(head) < _HEAD_BYTES and not _is_json(path) else []


def _is_json(path: Path) -> bool:
    from fairseq.runtime.files import parse_json

    try:
        parse_json(path.read_bytes(), str(path))
    except ValueError:
        return False
    return True


def _is_index(path: Path, *, named: bool) -> bool:
    sidecar = Path(f"{path}.json")
    if path.suffix[1:] in METRICS:
        return True
    return sidecar.is_file() and (named or any(word in _head(sidecar) for word in _INDEX_WORDS))


def _is_rows(path: Path) -> bool:
    """True for rows of GNN-LM, by their JSON file."""
    head = _head(Path(f"{path}.json"))
    return b'"fairseq-memory rows' in head or all(word in head for word in _ROW_WORDS)


def _is_combiner(weights: Path) -> bool:
    return weights.is_file() and b"fairseq-memory combiner" in _head(weights) + _head(weights.with_suffix(".json"))


def _of_tensors(path: Path) -> Found:
    """By the names of the arrays; the text that states the format may be damaged."""
    if _is_combiner(path):
        return [("combiner", path)]
    try:
        file = read_tensor_file(path, "file of --save-retrieval or memory")
    except ValueError:  # its check says what is damaged
        return [("memory" if path.suffix == ".safetensors" else "saved neighbours", path)]
    names, format_text = set(file.entries), file.metadata.get("format", "")
    if len(names & {"lm_logp", "lm_norm", "scores", "target"}) > 2 or format_text.startswith(
        "fairseq-memory retrieval"
    ):
        return [("saved neighbours", path)]
    if "centroids" in names or format_text.startswith("fairseq-memory product quantizer"):
        return [("codec", path)]
    is_memory = len(names & {"tokens", "places"}) == 2 or format_text.startswith("fairseq-memory")
    return [("memory", path)] if is_memory else []


def _is_archive(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)
