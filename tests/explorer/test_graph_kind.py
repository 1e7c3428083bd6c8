"""Exploring a GNN-LM, whose batches carry neighbours of their own, with a datastore on top."""

import numpy as np
import pytest
from explorer_oracle import column, packed
from gnn_commands import BLOCK, evaluate, fill

pytestmark = pytest.mark.slow


def test_the_explorer_shows_a_graph_model_with_a_datastore(tmp_path, explored):
    folder = fill(tmp_path)
    knn = ("--knnlm", "--k", 8, "--lmbda", 0.3, "--knn-keytype", "lm_output")
    store = ("--dstore-filename", folder / "stores" / "train")
    evaluate(folder, "gnn", *knn, *store, "--scores-file", tmp_path / "e.npz")
    path = ("--path", folder / "gnn" / "checkpoint_last.pt", "--cpu", "--max-tokens", 64, "--tokens-per-sample", BLOCK)
    explanation = explored("eval-lm", folder / "bin", *path, "--gen-subset", "valid", *knn, *store)
    np.testing.assert_allclose(column(explanation, "mixed"), np.load(tmp_path / "e.npz")["logp"], atol=1e-6)
    assert explanation.reader is None, "typed text has no neighbours"
    lm = explanation.details(9)["lm"]
    at = packed(lm["token"]).tolist().index(int(column(explanation, "token")[9]))
    assert packed(lm["logp"])[at] == pytest.approx(column(explanation, "lm")[9], abs=1e-4)
