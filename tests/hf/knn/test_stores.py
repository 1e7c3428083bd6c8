"""Stores of knn-transformers are found by their names, with their index and clusters; keys may be missing."""

from __future__ import annotations

import pickle

import faiss
import numpy as np
import pytest
import torch
from tiny_models import inputs, make

from fairseq.hf.knn.indexing import index_config
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.stores import StorePlace
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.index.build.build import build_index

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def original(tmp_path):
    """A model, and a folder as knn-transformers leaves it: raw arrays, an index and pickled clusters."""
    model = make("gpt2")
    saver = KNNSaver(dstore_dir=tmp_path / "ours")
    with saver(model):
        for seed in range(8):
            model(**inputs(model, batch=4, length=12, seed=seed))
    store = Datastore.open(saver.prefix)
    rows, dim = len(store), store.dim
    folder = tmp_path / "theirs"
    folder.mkdir()
    keys = np.asarray(store.keys)
    keys.tofile(folder / f"dstore_gpt2_{rows}_{dim}_keys.npy")
    np.asarray(store.values).astype(np.int32).tofile(folder / f"dstore_gpt2_{rows}_{dim}_vals.npy")
    index = faiss.index_factory(dim, "IVF8,Flat")
    index.train(keys.astype(np.float32))
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(folder / f"index_gpt2_{rows}_{dim}.indexed"))
    members = [np.arange(start, rows, 20) for start in range(20)]
    with open(folder / f"members_gpt2_{rows}_{dim}_352_20.pkl", "wb") as file:
        pickle.dump(members, file)
    np.zeros(10, np.int32).tofile(folder / f"dstore_distilgpt2_10_{dim}_vals.npy")  # another model's beside it
    return model, folder, saver.prefix, rows


@pytest.mark.parametrize("more", [{}, {"no_load_keys": True}, {"recompute_dists": True}, {"knn_sim_func": "dot"}])
def test_the_original_layout_gives_what_our_store_gives(original, more):
    model, folder, ours, rows = original
    call = inputs(model, seed=50)
    if more.get("no_load_keys"):
        next(folder.glob("dstore_gpt2_*_keys.npy")).unlink()
    same = {"knn_sim_func": "dot"} if "knn_sim_func" in more else {}
    with KNNWrapper(dstore_size=rows, dstore_dir=folder, dimension=16, k=9, probe=8, **more)(model):
        theirs = model(**call)
    with KNNWrapper(dstore_dir=ours, k=9, **same)(model):
        expected = model(**call)
    torch.testing.assert_close(theirs.logits, expected.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(theirs.loss, expected.loss, atol=1e-3, rtol=1e-3)


def test_clusters_are_picked_up(original):
    model, folder, _, rows = original
    call = inputs(model, seed=50)
    found = []
    for more in ({}, {"members": next(folder.glob("members_*"))}):
        with RetomatonWrapper(dstore_dir=folder, k=9, probe=8, **more)(model) as reto:
            found.append(model(**call).loss)
            assert reto.saved_share > 0
            clusters = reto.automaton.clusters[0]
            assert len(clusters) == rows
    assert torch.equal(*found)


def test_sizes_choose_among_several(original):
    model, folder, _, rows = original
    np.zeros(7, np.int32).tofile(folder / "dstore_gpt2_7_16_vals.npy")
    with pytest.raises(ValueError, match="several stores: dstore_gpt2_352_16, dstore_gpt2_7_16"):
        StorePlace.find(folder, "gpt2")
    assert StorePlace.find(folder, "gpt2", rows=rows).rows == rows
    assert StorePlace.find(folder / "dstore_gpt2_7_16", "gpt2").rows == 7
    np.full(rows, 99, np.int32).tofile(folder / f"dstore_gpt2_{rows}_16_vals.npy")
    with pytest.raises(ValueError, match="tokens 99 to 99, the model's vocabulary has 48"):
        KNNWrapper(dstore_dir=folder, dstore_size=rows, k=9).break_into(model)


def test_an_index_is_built_and_found(original, tmp_path):
    model, _, prefix, _ = original
    saver = KNNSaver(dstore_dir=tmp_path / "again")
    with saver(model):
        for seed in range(8):
            model(**inputs(model, batch=4, length=12, seed=seed))
    built = saver.build_index(ncentroids=4, code_size=8)
    with KNNWrapper(dstore_dir=tmp_path / "again", k=9, probe=4)(model) as knn:
        assert str(built.path) in str(knn.memory.index)
        assert knn.memory.score == "index"
        assert model(**inputs(model, seed=50)).loss.isfinite()


@pytest.mark.parametrize("wrapper", [KNNWrapper, RetomatonWrapper])
def test_rows_deleted_after_the_index_was_built_are_not_found(tmp_path, wrapper):
    model, settings = make("gpt2"), {"dstore_dir": tmp_path, "k": 9}
    call = inputs(model, batch=4, length=12)
    with KNNSaver(dstore_dir=tmp_path, dtype="float32")(model) as saver:
        model(**call)
    prefix = str(saver.prefix)
    index = build_index(index_config(StorePlace.find(prefix, "gpt2"), Datastore.open(prefix), use_faiss_cpu=True)).path
    with wrapper(**settings)(model):
        before = model(**call).loss
    deleted = np.random.default_rng(0).choice(44, 20, replace=False)
    delete(prefix, deleted)
    keys_ND = torch.from_numpy(np.asarray(Datastore.open(prefix).keys))
    with wrapper(**settings)(model) as memory:
        assert memory.memory.index.name == str(index)
        assert not set(memory.memory.neighbors(keys_ND).ids_NK.flatten().tolist()) & set(deleted.tolist())
        by_index = model(**call).loss
    index.unlink()  # exact from here on
    with wrapper(**settings)(model):
        torch.testing.assert_close(by_index, model(**call).loss, atol=1e-4, rtol=1e-4)
    assert before < by_index, "the text is its own memory"
