"""From neighbours to a decoder that stands in for them: export, training and evaluation, as a user does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairseq_cli import datastore, eval_lm, eval_lm_trime, train

pytest.importorskip("pyarrow")

TEXT = ("--sample-break-mode", "none", "--tokens-per-sample", "32", "--max-tokens", "128", "--cpu")
DECODER = (
    "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --decoder-attention-heads 2 --optimizer adam --lr 0.01 --tokens-per-sample 32 "
    "--max-tokens 128 --dropout 0 --sample-break-mode none --cpu --no-progress-bar --num-workers 0 --max-update 30 "
    "--criterion memory_decoder_loss"
).split()


@pytest.fixture(scope="module")
def model(data_bin: Path, trained: Path) -> list[str]:
    return [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *TEXT]


@pytest.fixture(scope="module")
def made(model, data_bin, tmp_path_factory):
    """Folder of a store, its own text's neighbours, their targets, and a decoder trained on them."""
    folder = tmp_path_factory.mktemp("decoder")
    store, saved, targets = (str(folder / name) for name in ("store", "train.retrieval", "train.arrow"))
    eval_lm.main([*model, "--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", store])
    knn = ["--knnlm", "--dstore-filename", store, "--k", "12", "--lmbda", "0.3"]
    eval_lm.main([*model, "--gen-subset", "train", *knn, "--save-retrieval", saved])
    datastore.main(["export-knn-targets", saved, "--out", targets, "--softmax-temp", "2"])
    train.main([str(data_bin), *DECODER, "--knn-targets", targets, "--save-dir", str(folder / "decoder")])
    return folder


def scores(path: Path, *words: str):
    eval_lm.main([*words, "--scores-file", str(path / "scores.npz")])
    return np.load(path / "scores.npz")["logp"]


def test_targets_leave_out_each_tokens_own_row(made):
    figures = json.loads((made / "train.arrow.run.json").read_text())["figures"]
    assert figures["own_rows_dropped"]
    assert figures["num_tokens"] == np.fromfile(made / "store_vals.npy", np.int64).size
    assert figures["temperature"] == 2.0


def test_decoder_is_mixed_by_its_share(made, model, tmp_path):
    decoder = str(made / "decoder" / "checkpoint_last.pt")
    alone = scores(tmp_path, *model)
    own = scores(tmp_path, model[0], "--path", decoder, *TEXT)
    words = [*model, "--memory-decoder", decoder, "--decoder-weight"]
    np.testing.assert_allclose(scores(tmp_path, *words, "0"), alone, atol=1e-6)
    mixed = np.logaddexp(np.log(0.7) + alone, np.log(0.3) + own)
    np.testing.assert_allclose(scores(tmp_path, *words, "0.3", "--prove", "20"), mixed, atol=1e-5)
    knn = ["--knnlm", "--dstore-filename", str(made / "store"), "--k", "12", "--lmbda"]
    neighbors = scores(tmp_path, *model, *knn, "1")
    both = scores(tmp_path, *words, "0.3", *knn, "0.2", "--prove", "20", "--eval-file", str(tmp_path / "figures.json"))
    np.testing.assert_allclose(both, np.logaddexp(np.log(0.8) + mixed, np.log(0.2) + neighbors), atol=1e-5)
    assert json.loads((tmp_path / "figures.json").read_text())["proof"]["passed"]


def test_proofs_of_a_full_softmax_pass(made, model, tmp_path):
    """Its log-sum is made of the target's score and rounds with it, which is no look ahead."""
    words = [model[0], "--path", str(made / "decoder" / "checkpoint_last.pt"), *TEXT, "--prove", "40"]
    words += ["--eval-file", str(tmp_path / "figures.json")]
    knn = ["--dstore-filename", str(made / "decoder-store"), "--k", "8", "--lmbda", "0.3"]
    saving = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", knn[1]]
    eval_lm.main([*words[:3], *TEXT, *saving])
    for command, more in (
        (eval_lm, []),
        (eval_lm, ["--knnlm", *knn]),
        (eval_lm_trime, ["--use-local", "--use-external", "--use-interp", *knn]),
    ):
        command.main([*words, *more])
        proof = json.loads((tmp_path / "figures.json").read_text())["proof"]
        assert proof["passed"], proof
        assert proof["causality"]["tolerance"] == 0.0


def test_a_saved_retrieval_is_of_the_mixture(made, model, tmp_path):
    words = [*model, "--knnlm", "--dstore-filename", str(made / "store"), "--k", "4", "--lmbda", "0.2"]
    words += ["--save-retrieval", str(tmp_path / "saved"), "--memory-decoder", str(made / "decoder/checkpoint_last.pt")]
    eval_lm.main([*words, "--decoder-weight", "0.3"])
    with pytest.raises(ValueError, match=r"decoder_weight 0.3 and 0.4|decoder_weight 0.4 and 0.3"):
        eval_lm.main([*words, "--decoder-weight", "0.4"])


def test_mistakes_are_one_line(made, model, tmp_path):
    decoder = str(made / "decoder" / "checkpoint_last.pt")
    with pytest.raises(ValueError, match="belong together; give both"):
        eval_lm.main([*model, "--memory-decoder", decoder])
    with pytest.raises(ValueError, match="--decoder-weight must be at most 1, got 1.5"):
        eval_lm.main([*model, "--memory-decoder", decoder, "--decoder-weight", "1.5"])
    with pytest.raises(ValueError, match="--memory-decoder: no checkpoint at"):
        eval_lm.main([*model, "--memory-decoder", str(tmp_path / "none"), "--decoder-weight", "0.5"])
    saving = ["--save-knnlm-dstore", "--dstore-mmap", str(tmp_path / "store"), "--memory-decoder", decoder]
    with pytest.raises(ValueError, match="changes no key"):
        eval_lm.main([*model, *saving, "--decoder-weight", "0.5"])
    with pytest.raises(ValueError, match="--k 13 is more than the 12 neighbours"):
        datastore.main(["export-knn-targets", str(made / "train.retrieval"), "--out", str(tmp_path / "x"), "--k", "13"])
    with pytest.raises(ValueError, match="give --out FILE"):
        datastore.main(["export-knn-targets", str(made / "train.retrieval")])
