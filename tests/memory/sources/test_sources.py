"""Memories of the text against loops over its tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.memory.scoring import log_sums
from fairseq.memory.similarity import scaled_products
from fairseq.memory.sources.local import LocalMemory
from fairseq.memory.sources.rolling import RollingMemory
from fairseq.memory.types import LogSums, Passage
from fairseq.sequence_scorer import TextMemory

DIM, VOCAB = 5, 9
SEEDS = st.integers(0, 10_000)


def random_text(seed, lengths, context, gaps=()):
    """Passages of these numbers of scored tokens, each with up to ``context`` tokens before it; some numbers missing.

    Returns them with the places of their scored tokens in the text. As in a model, a token that is read again as
    context has another key than it had when it was scored.
    """
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=rng)
    passages, start, number = [], 0, 7
    for i, length in enumerate(lengths):
        first, end = max(0, start - context), start + length
        key_TD = torch.randn(end - first, DIM, generator=rng) * 2
        number += 3 if i in gaps else 1
        passages.append((Passage(number, key_TD, tokens[first:end], start - first), range(start, end)))
        start = end
    return passages


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist())) / math.sqrt(len(a))


def offered(found, n):
    """(token, score) of what position n may use, in order."""
    values = found.values_NM[0 if len(found.values_NM) == 1 else n].tolist()
    return [(v, s) for v, s, keep in zip(values, found.scores_NM[n].tolist(), found.keep_NM[n].tolist()) if keep]


def assert_offers(found, passage, rows):
    """``rows``: for each scored position, the (key, token) pairs it should see, in order."""
    assert len(found.keep_NM) == len(passage.queries) == len(rows)
    for n, row in enumerate(rows):
        ours = offered(found, n)
        assert [token for token, _ in ours] == [token for _, token in row]
        wanted = [dot(passage.queries[n], key) for key, _ in row]
        assert [score for _, score in ours] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def local_rows(passage):
    """What each scored position has before it in its own input."""
    pairs = list(zip(passage.key_TD, passage.value_T.tolist()))
    return [pairs[:place] for place in range(passage.num_context, len(pairs))]


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 9), context=st.integers(0, 6))
def test_local_memory_offers_what_comes_before_in_the_input_and_nothing_else(seed, length, context):
    for passage, _ in random_text(seed, [4, length, 2], context):
        assert_offers(LocalMemory().lookup(passage), passage, local_rows(passage))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 9), context=st.integers(0, 6))
def test_local_memory_never_sees_the_present_or_the_future(seed, length, context):
    passage, _ = random_text(seed, [6, length], context)[1]
    found = LocalMemory().lookup(passage)
    for n in range(length):
        place = passage.num_context + n
        key_TD, value_T = passage.key_TD.clone(), passage.value_T.clone()
        key_TD[place + 1 :] += 1
        value_T[place:] += 1
        other = LocalMemory().lookup(Passage(passage.number, key_TD, value_T, passage.num_context))
        assert other.keep_NM[n].tolist() == [m < place for m in range(place)] + [False] * (length - n)
        for (token, score), (same_token, same_score) in zip(offered(found, n), offered(other, n), strict=True):
            assert token == same_token
            assert score == pytest.approx(same_score, rel=1e-4, abs=1e-5)


def test_the_first_token_of_a_text_has_no_local_memory():
    passage, _ = random_text(0, [3], context=4)[0]
    found = LocalMemory().lookup(passage)
    assert found.keep_NM.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    sums = log_sums(found, passage.targets, 1.0)
    assert sums.whole_N[0] == sums.hit_N[0] == -torch.inf


class ListMemory:
    """The long-term memory as a list of (place in the text, key, token)."""

    def __init__(self, size, dedup):
        self.size, self.dedup = size, dedup
        self.rows, self.number = [], None

    def seen_by(self, passage, places):
        if self.number is not None and passage.number != self.number + 1:
            self.rows = []
        context = range(places.start - passage.num_context, places.start)
        return [(key, token) for place, key, token in self.rows if not (self.dedup and place in context)]

    def append(self, passage, places):
        self.rows += zip(places, passage.queries, passage.targets.tolist())
        self.rows, self.number = self.rows[-self.size :], passage.number


@settings(max_examples=120, deadline=None)
@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    size=st.integers(1, 25),
    context=st.integers(0, 12),
    dedup=st.booleans(),
    gaps=st.sets(st.integers(1, 24), max_size=3),
)
def test_rolling_memory_is_a_list_of_the_last_scored_tokens(seed, lengths, size, context, dedup, gaps):
    memory, oracle = RollingMemory(size, dedup=dedup), ListMemory(size, dedup)
    for passage, places in random_text(seed, lengths, context, gaps):
        found = memory.lookup(passage)
        assert_offers(found, passage, [oracle.seen_by(passage, places)] * len(places))
        memory.append(passage)
        oracle.append(passage, places)
        assert len(memory) == len(oracle.rows)


def test_rolling_memory_over_thousands_of_tokens():
    """The same at a size where the buffer is turned over many times."""
    lengths = torch.randint(1, 40, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    memory, oracle = RollingMemory(50), ListMemory(50, dedup=False)
    for passage, places in random_text(1, lengths, context=0):
        found = memory.lookup(passage)
        rows = oracle.seen_by(passage, places)
        assert found.values_NM[0].tolist() == [token for _, token in rows]
        keys = torch.stack([key for key, _ in rows]) if rows else torch.empty(0, DIM)
        torch.testing.assert_close(found.scores_NM, scaled_products(passage.queries, keys))
        memory.append(passage)
        oracle.append(passage, places)


def test_a_gap_in_the_text_empties_the_long_term_memory():
    (one, _), (two, _), (three, _) = random_text(0, [4, 3, 2], context=2, gaps={2})
    memory = RollingMemory(10)
    memory.append(one)
    assert memory.lookup(two).keep_NM.shape == (3, 4)
    memory.append(two)
    assert len(memory) == 7
    assert memory.lookup(three).keep_NM.shape == (2, 0)
    memory.append(three)
    assert len(memory) == 2
    assert memory.lookup(one).keep_NM.shape == (4, 0)  # back to the beginning


def test_reset_forgets_everything():
    memory = RollingMemory(10)
    (one, _), (two, _) = random_text(0, [4, 3], context=2)
    memory.append(one)
    memory.reset()
    assert len(memory) == 0
    assert memory.lookup(two).keep_NM.shape == (3, 0)
    memory.append(two)
    assert len(memory) == 3
    LocalMemory().reset()
    assert_offers(LocalMemory().lookup(two), two, local_rows(two))


def test_candidates_stay_as_they_were_when_the_memory_goes_on():
    memory = RollingMemory(3)
    (first, _), *others = random_text(3, [3] * 12, context=0)
    memory.append(first)
    found = memory.lookup(others[0][0])
    values = found.values_NM.tolist()
    for passage, _ in others:
        memory.append(passage)
    assert found.values_NM.tolist() == values


@pytest.mark.parametrize("size", [0, -3])
def test_a_long_term_memory_without_room_is_refused(size):
    with pytest.raises(ValueError, match=f"--mem-size of at least 1, got {size}"):
        RollingMemory(size)


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    size=st.integers(1, 20),
    context=st.integers(0, 8),
    dedup=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 1.25]),
)
def test_sums_of_both_memories_are_those_of_all_their_candidates(seed, lengths, size, context, dedup, temperature):
    memory = TextMemory([LocalMemory(), RollingMemory(size, dedup=dedup)], temperature)
    oracle = ListMemory(size, dedup)
    for passage, places in random_text(seed, lengths, context):
        sums = memory.sums(passage)
        rows = [oracle.seen_by(passage, places) + own for own in local_rows(passage)]
        for n, row in enumerate(rows):
            shares = [(math.exp(dot(passage.queries[n], key) / temperature), token) for key, token in row]
            whole = sum(share for share, _ in shares)
            hit = sum(share for share, token in shares if token == passage.targets[n])
            assert sums.whole_N[n].item() == pytest.approx(math.log(whole) if whole else -math.inf, rel=1e-4, abs=1e-4)
            assert sums.hit_N[n].item() == pytest.approx(math.log(hit) if hit else -math.inf, rel=1e-4, abs=1e-4)
        oracle.append(passage, places)


def test_sums_of_two_memories_where_one_or_both_are_empty():
    nothing = LogSums(torch.tensor([-torch.inf]), torch.tensor([-torch.inf]))
    something = LogSums(torch.tensor([1.5]), torch.tensor([2.5]))
    for one, other in ((something, nothing), (nothing, something), (something, None)):
        both = one.plus(other)
        assert (both.hit_N.item(), both.whole_N.item()) == (1.5, 2.5)
    assert nothing.plus(nothing).whole_N.item() == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_keys_in_half_precision_do_not_overflow(dtype):
    """Inner products beyond float16's 65504; their share by the root of the width is far below."""
    key_TD = (torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    passage = Passage(1, key_TD, torch.tensor([1, 2, 1, 1, 2, 1]), 2)
    exact = key_TD.double() @ key_TD.double().T
    assert exact.min() > torch.finfo(torch.float16).max
    rolling = RollingMemory(8)
    rolling.append(Passage(0, key_TD, passage.value_T, 0))
    wanted = (exact / math.sqrt(1024))[2:].float()
    for source in (LocalMemory(), rolling):
        found = source.lookup(passage)
        assert found.scores_NM.dtype == torch.float32
        torch.testing.assert_close(found.scores_NM, wanted, rtol=torch.finfo(dtype).eps * 2, atol=0)
        sums = log_sums(found, passage.targets, 1.25)
        assert torch.isfinite(sums.whole_N).all()
        assert torch.isfinite(sums.hit_N).all()
