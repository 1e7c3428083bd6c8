"""Selecting by groups of types finds what sorting all types finds."""

import pytest
import torch

from fairseq.generation.beam_search import best_continuations


@pytest.mark.parametrize("shape", [(3, 4, 7), (5, 1, 301), (2, 3, 50), (2, 4, 3016), (1, 1, 9), (2, 2, 10007)])
@pytest.mark.parametrize("count", [2, 8, 18])
def test_the_best_of_a_sentence_are_those_of_all_its_rows(shape, count):
    sentences, rows, vocabulary = shape
    torch.manual_seed(0)
    logp_RV = torch.randn(sentences * rows, vocabulary).log_softmax(1)
    logp_RV[:, 1] = -torch.inf
    total_SK = -5 * torch.rand(sentences, rows)
    found = best_continuations(logp_RV, total_SK, count)
    all_SE = (logp_RV.view(shape) + total_SK[:, :, None]).flatten(1)
    total_SC, place_SC = all_SE.sort(dim=1, descending=True)
    finite = min(count, rows * (vocabulary - 1))  # those at -inf are in any order
    assert torch.equal(found.total_SC[:, :finite], total_SC[:, :finite])
    assert torch.equal(found.row_SC[:, :finite], place_SC[:, :finite] // vocabulary)
    assert torch.equal(found.token_SC[:, :finite], place_SC[:, :finite] % vocabulary)
