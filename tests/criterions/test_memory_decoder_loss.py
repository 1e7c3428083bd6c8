"""The loss of a decoder that learns what neighbours say, against the formula written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import PAD, VOCAB, make_model

from fairseq.criterions.base import build_criterion
from fairseq.criterions.configs import MemoryDecoderConfig
from fairseq.criterions.memory_decoder_loss import MemoryDecoderLoss
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")

N = 29


@pytest.fixture
def text():
    return np.random.default_rng(0).integers(4, VOCAB, N)


@pytest.fixture
def targets(text, tmp_path):
    """A file of targets, and what it holds: tokens and probabilities of each position; one has none."""
    rng = np.random.default_rng(1)
    rows = [rng.choice(VOCAB, rng.integers(1, 5), replace=False).tolist() for _ in text]
    rows[4] = []
    probs = [rng.dirichlet(np.ones(len(row))).astype(np.float16) if row else np.empty(0, np.float16) for row in rows]
    i32, f16 = pyarrow.int32(), pyarrow.float16()
    table = pyarrow.table(
        {
            "id_cnt": pyarrow.array([len(row) for row in rows], i32),
            "token_id": pyarrow.array(rows, pyarrow.list_(i32)),
            "prob": pyarrow.array([list(p) for p in probs], pyarrow.list_(f16)),
            "label": pyarrow.array(text, i32),
        }
    )
    path = tmp_path / "targets.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=8)
    return str(path), rows, probs


def task_of(tokens, folders=("data",), bos=None):
    blocks = TokenBlockDataset(tokens, np.array([len(tokens)]), 6)
    dataset = MonolingualDataset(blocks, PAD, 2, bos)
    return SimpleNamespace(folders=list(folders), blocks=lambda split, combine: dataset), dataset


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_formula(text, targets, alpha, bos):
    path, rows, probs = targets
    model = make_model().train()
    task, dataset = task_of(text, bos=bos)
    criterion = MemoryDecoderLoss(MemoryDecoderConfig(knn_targets=path, knn_alpha=alpha))
    criterion.attach(task)
    batch = dataset.collate([3, 0, 4])  # the last block is a short one
    loss = criterion(model, batch)
    kl = nll = 0.0
    for row, number in enumerate([3, 0, 4]):
        with torch.no_grad():
            hidden_TD = model(batch.tokens_BT[row : row + 1]).hidden_BTD[0, (bos is not None) :]
            logp_TV = model.vocab_logp(hidden_TD).double()
        for t, place in enumerate(range(6 * number, min(6 * number + 6, N))):
            nll -= float(logp_TV[t, text[place]])
            for token, p in zip(rows[place], probs[place].tolist()):
                kl += p * (math.log(p) - float(logp_TV[t, token])) if p else 0.0
    assert float(loss.sum.detach()) == pytest.approx(alpha * kl + (1 - alpha) * nll, rel=1e-5)
    assert float(loss.log["kl_loss"]) == pytest.approx(kl, rel=1e-5)
    assert float(loss.log["nll_loss"]) == pytest.approx(nll, rel=1e-5)
    assert loss.sample_size == 17
    loss.sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_validation_reports_the_cross_entropy(text, targets):
    model = make_model().eval()
    task, dataset = task_of(text)
    criterion = MemoryDecoderLoss(MemoryDecoderConfig(knn_targets=targets[0]))
    criterion.attach(task)
    batch = dataset.collate([0, 1])
    with torch.no_grad():
        hidden_ND, target_N = model(batch.tokens_BT).hidden_BTD.flatten(0, 1), batch.target_BT.flatten()
        wanted = -float(model.target_logp(hidden_ND, target_N)[0].sum())
        assert float(criterion(model, batch).sum) == pytest.approx(wanted)


def test_a_batch_without_rows_has_a_gradient(text, targets):
    model = make_model().train()
    task, dataset = task_of(text)
    criterion = MemoryDecoderLoss(MemoryDecoderConfig(knn_targets=targets[0]))
    criterion.attach(task)
    loss = criterion(model, dataset.collate([]))
    loss.sum.backward()
    assert float(loss.sum.detach()) == 0.0


def test_targets_are_of_the_split_that_is_trained_on(text, targets):
    task, dataset = task_of(text)
    other, _ = task_of(text[:-1])
    task.blocks = lambda split, combine: dataset if split == "mine" else other.blocks(split, combine)
    given = {"knn_targets": targets[0], "train_subset": "mine"}
    build_criterion("memory_decoder_loss", given, make_model(), task)
    with pytest.raises(ValueError, match="split 'train' has 28"):
        build_criterion("memory_decoder_loss", {"knn_targets": targets[0]}, make_model(), task)


def test_tokens_beyond_the_dictionary_are_named(text, targets):
    task, dataset = task_of(text)
    criterion = MemoryDecoderLoss(MemoryDecoderConfig(knn_targets=targets[0]))
    criterion.attach(task)
    largest = max(token for row in targets[1] for token in row)
    with pytest.raises(ValueError, match=f"holds token {largest}, the model has {largest} types: the file is damaged"):
        criterion._rows(dataset.collate(list(range(len(dataset)))), largest, torch.device("cpu"))


def test_targets_of_another_text_are_rejected(text, targets):
    criterion = MemoryDecoderLoss(MemoryDecoderConfig(knn_targets=targets[0]))
    with pytest.raises(ValueError, match=f"has {N} tokens, split 'train' has {N - 1}"):
        criterion.attach(task_of(text[:-1])[0])
    other = text.copy()
    other[17] = 4 + (other[17] - 3) % (VOCAB - 4)
    with pytest.raises(ValueError, match="of another text: token 17 is"):
        criterion.attach(task_of(other)[0])
    with pytest.raises(ValueError, match="take turns; give one"):
        criterion.attach(task_of(text, ("a", "b"))[0])
    with pytest.raises(ValueError, match="needs --knn-targets"):
        MemoryDecoderConfig()
    with pytest.raises(ValueError, match="--knn-alpha 1.5 is not in"):
        MemoryDecoderConfig(knn_targets="x", knn_alpha=1.5)
