"""Places in the text of what each position of a row predicts."""

import numpy as np
import pytest

from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset

TOKENS = np.arange(100, 130)


@pytest.mark.parametrize("bos", [None, 9])
@pytest.mark.parametrize("context", [0, 3, 11])
def test_each_position_predicts_the_token_at_its_place(bos, context):
    blocks = MonolingualDataset(TokenBlockDataset(TOKENS, np.array([7, 1, 12, 10]), 7, "none"), 1, 2, bos)
    dataset = LMContextWindowDataset(blocks, np.arange(len(blocks)), context, 40)
    ids = [3, 0, 4]
    batch, places = dataset.collate(ids), dataset.places(ids)
    for row, place in enumerate(places):
        before, source = batch.tokens_BT[row].numpy(), batch.target_BT[row].numpy()
        assert len(place) == (before != 1).sum()
        scored = np.flatnonzero(batch.scored_BT[row].numpy())
        np.testing.assert_array_equal(TOKENS[place[scored]], source[scored])
        assert (place == -1).sum() == (before == (bos or -5)).sum(), "<s> predicts nothing that is in the text"
        for column in np.flatnonzero(place[:-1] >= 0):
            if place[column + 1] > 0 and before[column + 1] != bos:
                assert TOKENS[place[column + 1] - 1] == before[column + 1], "a position has read what is before it"
