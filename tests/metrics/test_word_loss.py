"""The mean loss per word against a loop over the tokens."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.metrics.word_loss import LossSums, loss_sums

TOKENS = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([-0.5, -2.0, -math.inf])), max_size=20)


@given(TOKENS)
def test_sums_are_those_of_a_loop(tokens):
    tokens = sorted(tokens, key=lambda token: token[0])
    possible = [token for token in tokens if token[2] > -math.inf]
    ends = [block for block, *_ in possible[1:]] + [None]
    counted = sum(not (continues and block == after) for (block, continues, _), after in zip(possible, ends))
    block, continues, logp = (np.array([t[i] for t in tokens], kind) for i, kind in enumerate((int, bool, float)))
    sums = loss_sums(block, continues, logp)
    assert sums.num_tokens == len(tokens)
    assert sums.num_impossible == len(tokens) - len(possible)
    assert sums.num_counted == counted
    assert sums.nats == pytest.approx(-sum(token[2] for token in possible))


def test_parts_add_up():
    both = LossSums(4.0, 5, 4, 1).plus(LossSums(2.0, 3, 2, 0))
    assert both == LossSums(6.0, 8, 6, 1)
    assert both.loss_base2 == pytest.approx(1 / math.log(2))
    assert both.perplexity == pytest.approx(math.e)
    assert LossSums().loss_base2 == math.inf
