import numpy as np
import pytest
import torch

from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import BREAK_MODES, TokenBlockDataset
from fairseq.data.types import LMBatch

PAD, EOS, BOS = 1, 2, 0
TEXT = np.array([5, 6, 2, 2, 7, 8, 9, 2, 4, 2], dtype=np.uint16)
SIZES = np.array([3, 1, 4, 2])


def dataset(mode="none", block_size=4, bos=None):
    return MonolingualDataset(TokenBlockDataset(TEXT, SIZES, block_size, mode), PAD, EOS, bos)


@pytest.mark.parametrize("mode", BREAK_MODES)
def test_each_target_is_read_as_the_next_source(mode):
    data = dataset(mode)
    stream = [EOS, *TEXT.tolist()]
    for i in range(len(data)):
        start, size = int(data.blocks.starts[i]), int(data.sizes[i])
        assert data.source(i).tolist() == stream[start : start + size]
        assert data.target(i).tolist() == stream[start + 1 : start + 1 + size]


def test_collate_pads_at_the_right():
    batch = dataset().collate([2, 0])
    assert batch.ids_B.tolist() == [2, 0]
    assert batch.tokens_BT.tolist() == [[2, 4, PAD, PAD], [EOS, 5, 6, 2]]
    assert batch.target_BT.tolist() == [[4, 2, PAD, PAD], [5, 6, 2, 2]]
    assert batch.scored_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.num_scored == 6
    assert batch.tokens_BT.dtype == batch.target_BT.dtype == batch.ids_B.dtype == torch.int64


def test_bos_is_read_first_and_not_scored():
    batch = dataset(bos=BOS).collate(np.array([0, 2]))
    assert batch.tokens_BT.tolist() == [[BOS, EOS, 5, 6, 2], [BOS, 2, 4, PAD, PAD]]
    assert batch.target_BT.tolist() == [[PAD, 5, 6, 2, 2], [PAD, 4, 2, PAD, PAD]]
    assert batch.scored_BT[:, 0].tolist() == [False, False]
    assert batch.num_scored == 6


def test_no_blocks_make_an_empty_batch():
    batch = dataset().collate([])
    assert (len(batch.ids_B), batch.num_scored) == (0, 0)


def test_a_pad_token_of_the_text_is_scored():
    data = MonolingualDataset(TokenBlockDataset(np.array([5, PAD, 2]), np.array([3]), 3), PAD, EOS)
    assert data.collate([0]).num_scored == 3


def test_splitting_long_blocks_keeps_source_and_target_aligned():
    data = dataset("eos").with_long_blocks_split(2)
    assert data.sizes.tolist() == [2, 1, 1, 2, 2, 2]
    assert np.concatenate([data.target(i) for i in range(6)]).tolist() == TEXT.tolist()
    assert np.concatenate([data.source(i) for i in range(6)]).tolist() == [EOS, *TEXT[:-1].tolist()]


def test_batch_survives_a_move_and_its_parts():
    batch = dataset().collate([0, 2])
    again = LMBatch(*batch.to("cpu").parts())
    assert again.num_scored == batch.num_scored == int(batch.scored_BT.sum())
    assert all(torch.equal(a, b) for a, b in zip(again.parts()[:4], batch.parts()[:4]))
    assert LMBatch(*batch.parts()[:4]).num_scored == batch.num_scored
