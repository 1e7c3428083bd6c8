"""Index files that are not what they should be: cut short, exchanged, of another store, of an older store."""

from pathlib import Path

import numpy as np
import pytest
import torch
from store_making import save_keys

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.sources.config import KnnConfig
from fairseq.memory.sources.external import open_external
from fairseq.memory.types import Metric
from fairseq.runtime.files import locked

ROWS, DIM = 900, 8


def save(prefix: Path, seed: int = 0, rows: int = ROWS, dim: int = DIM) -> np.ndarray:
    keys = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    save_keys(prefix, keys)
    return keys


def build(prefix: Path, name: str = "knn", **more) -> Path:
    settings = {"index": "ivfsq8", "ncentroids": 4} | more
    return build_index(BuildConfig(dstore_mmap=str(prefix), faiss_index=str(prefix.parent / name), **settings)).path


def opened(prefix: Path, name: str = "knn", **more):
    words = {"num_neighbors": 5, "weight": 0.5, "dstore_filename": str(prefix)} | more
    return open_external(KnnConfig(indexfile=str(prefix.parent / name), **words), dim=DIM)


def test_a_store_that_grew_or_was_saved_anew_is_noticed(tmp_path):
    save(tmp_path / "d")
    build(tmp_path / "d")
    assert len(opened(tmp_path / "d").index) == ROWS
    save(tmp_path / "d", seed=1)
    with pytest.raises(ValueError, match=r"was built over other keys than datastore .* holds now; rebuild it"):
        opened(tmp_path / "d")
    save(tmp_path / "d", rows=ROWS + 1)
    with pytest.raises(ValueError, match=r"other keys|the index holds 900 rows, datastore .* 901"):
        opened(tmp_path / "d")
    # A build goes on from nothing of the older store.
    assert len(FaissIndex.open(build(tmp_path / "d"), Metric.L2)) == ROWS + 1
    assert len(opened(tmp_path / "d").index) == ROWS + 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_exchanged_and_damaged_files_are_noticed(tmp_path, on_disk):
    save(tmp_path / "d")
    mine, other = build(tmp_path / "d", "mine", on_disk=on_disk), build(tmp_path / "d", "other", seed=9)
    ending = ".ivfdata" if on_disk else ""
    file = Path(f"{mine}{ending}")
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:200], other.read_bytes(), whole[:-5] + b"\1\2\3\4\5"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not the file that .* describes"):
            opened(tmp_path / "d", "mine")
    file.write_bytes(whole)
    opened(tmp_path / "d", "mine")
    Path(f"{mine}.json").unlink()  # an index that plain faiss made has none
    file.write_bytes(whole[:500])
    if not on_disk:
        with pytest.raises(ValueError, match="is not a whole faiss index"):
            opened(tmp_path / "d", "mine")


def test_a_foreign_index_is_noticed(tmp_path):
    save(tmp_path / "d")
    save(tmp_path / "wide", dim=16)
    build(tmp_path / "wide", "wide-index")
    with pytest.raises(ValueError, match=r"width 16|other keys"):
        opened(tmp_path / "d", "wide-index")
    (tmp_path / "text.l2").write_text("no index at all, but a text of more than a few bytes\n" * 20)
    with pytest.raises(ValueError, match="is not a whole faiss index"):
        opened(tmp_path / "d", "text")


def test_a_cosine_index_is_no_index_of_inner_products(tmp_path):
    save(tmp_path / "d")
    path = build(tmp_path / "d", dist="cos")
    for ending in ("", ".json"):
        Path(f"{path}{ending}").rename(tmp_path / f"plain{ending}")
    with pytest.raises(ValueError, match="uses metric cos but --faiss-metric-type is ip; pass --faiss-metric-type cos"):
        opened(tmp_path / "d", "plain", faiss_metric_type="ip")
    assert opened(tmp_path / "d", "plain", faiss_metric_type="cos").index.metric is Metric.COS


@pytest.mark.parametrize("more", [{}, {"index_mmap": True}, {"use_faiss_cpu": True}, {"indexfile": None}])
def test_rows_deleted_after_the_build_are_not_looked_up(tmp_path, more):
    keys = save(tmp_path / "d")
    build(tmp_path / "d")
    delete(tmp_path / "d", np.arange(300, 600))
    words = {"num_neighbors": 5, "weight": 0.5, "dstore_filename": str(tmp_path / "d"), "probe": 4}
    config = KnnConfig(**(words | {"indexfile": str(tmp_path / "knn")} | more))
    memory = open_external(config, dim=DIM)
    found = memory.lookup(torch.from_numpy(keys[300:600]))
    assert not np.isin(found.values_NM.numpy(), np.arange(300, 600)).any()  # a row's value is its number
    with pytest.raises(ValueError, match="--k 601 is larger than the datastore, which has 600 rows"):
        open_external(KnnConfig(**(words | {"num_neighbors": 601} | more)), dim=DIM)


@pytest.mark.parametrize("kind", [*INDEXES, "HNSW8", "PCA4,IVF4,Flat"])
def test_a_document_deleted_after_the_build_is_gone_for_every_kind(tmp_path, kind):
    keys = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    runs = np.array([[30 * number, number, 0] for number in range(30)])
    with DatastoreWriter(tmp_path / "d", ROWS, DIM, "float32", {}, documents=runs) as writer:
        writer.append(keys, np.arange(ROWS))
        writer.finish()
    build(tmp_path / "d", index=kind, code_size=4)
    before = opened(tmp_path / "d", probe=4).lookup(torch.from_numpy(keys[90:120]))
    gone = np.concatenate([np.arange(90, 120), np.arange(600, 630)])
    assert np.isin(before.values_NM.numpy(), gone).any()
    delete(tmp_path / "d", documents=[3, 20])
    after = opened(tmp_path / "d", probe=4).lookup(torch.from_numpy(keys[90:120]))
    assert not np.isin(after.values_NM.numpy(), gone).any()
    assert after.keep_NM.any(1).all()


def test_a_folder_without_room_for_files_is_told_first(tmp_path):
    save(tmp_path / "d")
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OSError, match=r"cannot write in .*closed.*: it is read-only; choose another folder"):
        build(tmp_path / "d", name="closed/knn")


def test_two_builders_of_one_index_are_kept_apart_and_parts_are_not(tmp_path):
    save(tmp_path / "d")
    with (
        locked(tmp_path / "knn.l2.lock", "index"),
        pytest.raises(OSError, match=r"another process is writing index .*knn.l2"),
    ):
        build(tmp_path / "d")
    build(tmp_path / "d")
    assert len(Datastore.open(tmp_path / "d")) == ROWS


def test_neighbours_that_are_no_numbers_are_none(tmp_path):
    save(tmp_path / "d")
    index = FaissIndex.open(build(tmp_path / "d"), Metric.L2)
    found = index._checked(torch.tensor([[3, 4]]), torch.tensor([[torch.nan, -1.0]]))
    assert found.ids_NK.tolist() == [[4, -1]]
    assert found.scores_NK.tolist() == [[-1.0, -torch.inf]]
