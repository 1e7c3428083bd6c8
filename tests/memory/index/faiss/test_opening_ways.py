"""Every kind of index, its lists in a file of their own too, opened in every way, in a process that may die of it."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from forked_commands import Forks
from store_making import save_keys

from fairseq.memory.datastore import Datastore
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss.lists_file import check_lists_file
from fairseq.memory.index.opening import open_index
from fairseq.memory.types import Metric

ROWS, DIM = 2000, 16
KEYS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
OTHERS = ("HNSW8", "PCA8,IVF8,SQ8", "IVF8,Flat", "IVF8_HNSW8,SQ8", "PQ4x4fs", "IVF8,SQ8,RFlat")
WITH_LISTS_FILE = ("ivfpq", "ivfsq8", "PCA8,IVF8,SQ8")
# One process for all files: it prints the rows found, or dies and prints nothing for those that follow.
SEARCH = """
import sys
import numpy as np, torch
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.opening import open_index
from fairseq.memory.types import Metric
for name in sys.argv[2:]:
    for mapped in (False, True):
        index = FaissIndex.open(name, Metric.L2, mapped=mapped)
        index.set_probe(8)
        keys = torch.from_numpy(np.load(sys.argv[1]))
        for count, k in ((1, 1), (2, 5), (2, 600), (200, 5), (200, 600)):
            ids = index.search(keys[:count], k).ids_NK
            print(name, mapped, count, k, hash(ids.numpy().tobytes()), int(ids[0, 0]), flush=True)
"""


def built(folder: Path, store: Path, kind: str, *, on_disk: bool = False) -> Path:
    name = folder / f"{kind.replace(',', '-')}{'.elsewhere' if on_disk else ''}"
    sizes = {"ncentroids": 8, "code_size": 8, "report_queries": 8, "report_k": 8}
    return build_index(
        BuildConfig(dstore_mmap=str(store), faiss_index=str(name), index=kind, on_disk=on_disk, **sizes)
    ).path


def test_every_kind_opens_in_every_way(forks: Forks, tmp_path: Path) -> None:
    store = save_keys(tmp_path / "store", KEYS)
    paths = [built(tmp_path, store, kind) for kind in (*INDEXES, *OTHERS)]
    pairs = {kind: built(tmp_path, store, kind, on_disk=True) for kind in WITH_LISTS_FILE}
    np.save(tmp_path / "keys.npy", KEYS)
    (tmp_path / "search.py").write_text(SEARCH)
    done = forks.start(str(tmp_path / "search.py"), tmp_path / "keys.npy", *paths, *pairs.values())
    assert done.wait() == 0, done.err
    found = {tuple(words[:4]): words[4:] for words in map(str.split, done.out.splitlines()) if len(words) == 6}
    assert len(found) == 10 * (len(paths) + len(pairs))
    for (name, mapped, *query), rows in found.items():
        assert rows == found[(name, str(mapped == "False"), *query)], (name, query)
    for kind, elsewhere in pairs.items():
        same = next(path for path in paths if path.name == elsewhere.name.replace(".elsewhere", ""))
        for query in (("1", "1"), ("2", "5"), ("200", "600")):
            assert found[(str(elsewhere), "True", *query)] == found[(str(same), "True", *query)], kind


@pytest.mark.parametrize("prefix", ["", "PCA8,"])
def test_a_lists_file_of_others_is_recognised_without_metadata(tmp_path: Path, prefix: str) -> None:
    index = faiss.index_factory(DIM, f"{prefix}IVF8,SQ8")
    index.train(KEYS)
    index.verbose = False
    inner = faiss.downcast_index(faiss.extract_index_ivf(index))
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(tmp_path / "rows.ivfdata"))
    inner.replace_invlists(lists, False)
    index.add(KEYS)
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert check_lists_file(tmp_path / "theirs", {})
    found = FaissIndex.open(tmp_path / "theirs", Metric.L2, mapped=True)
    assert len(found) == ROWS
    size = (tmp_path / "rows.ivfdata").stat().st_size
    with open(tmp_path / "rows.ivfdata", "rb+") as file:
        file.truncate(size - 1)
    with pytest.raises(
        ValueError, match=rf"rows.ivfdata has {size - 1} bytes, the lists of .*theirs {size}; copy both"
    ):
        FaissIndex.open(tmp_path / "theirs", Metric.L2, mapped=True)
    (tmp_path / "rows.ivfdata").unlink()
    with pytest.raises(ValueError, match=r"rows.ivfdata is missing: it holds the lists of .*theirs"):
        FaissIndex.open(tmp_path / "theirs", Metric.L2)


def test_an_empty_file_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "x.l2").touch()
    for mapped in (False, True):
        with pytest.raises(ValueError, match="x.l2 is not a whole faiss index"):
            FaissIndex.open(tmp_path / "x", Metric.L2, mapped=mapped)


def test_bytes_that_look_like_a_description_are_none(tmp_path: Path) -> None:
    for content in (b"ilod", b"ilod" * 40, b"\0" * 100 + b"ilod" + b"\1" * 50, b"ilod" + b"\0" * 200):
        (tmp_path / "codes").write_bytes(content)
        assert not check_lists_file(tmp_path / "codes", {})


def test_an_index_that_lost_its_signature_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Datastore.open(save_keys(tmp_path / "store", KEYS))
    path = built(tmp_path, tmp_path / "store", "flat")
    open_index(store, Metric.L2, path)
    assert "does not say" not in caplog.text
    metadata = json.loads(Path(f"{path}.json").read_text())
    del metadata["signature"]
    Path(f"{path}.json").write_text(json.dumps(metadata))
    open_index(store, Metric.L2, path)
    assert f"{path} does not say over which keys it was built" in caplog.text
