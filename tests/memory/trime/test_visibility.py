"""Who sees whom, against loops over every pair; and that strips and their pieces leave nothing out."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.memory.trime.visibility import (
    ELSEWHERE,
    EXTERNAL,
    LOCAL,
    LONG,
    SegmentStrip,
    VisibilityRule,
    segment_strips,
)

RULES = [VisibilityRule(*flags) for flags in itertools.product([False, True], repeat=3)]
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=7)


def seen_by_loop(rule, lengths):
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    sees = [
        [
            (rule.own_past and segment[m] == segment[n] and m < n)
            or (rule.earlier and segment[m] < segment[n])
            or (rule.later and segment[m] > segment[n])
            for m in range(len(segment))
        ]
        for n in range(len(segment))
    ]
    return torch.tensor(sees, dtype=torch.bool).view(len(segment), len(segment))


def test_the_named_rules_are_those_of_the_paper():
    # Segments of 2 and 1: rows see columns.
    expected = {
        LOCAL: [[0, 0, 0], [1, 0, 0], [0, 0, 0]],
        LONG: [[0, 0, 0], [1, 0, 0], [1, 1, 0]],
        EXTERNAL: [[0, 0, 1], [1, 0, 1], [1, 1, 0]],
        ELSEWHERE: [[0, 0, 1], [0, 0, 1], [1, 1, 0]],
    }
    for rule, sees in expected.items():
        assert rule.mask([2, 1]).int().tolist() == sees


@given(rule=st.sampled_from(RULES), lengths=LENGTHS)
def test_the_mask_is_the_rule(rule, lengths):
    assert torch.equal(rule.mask(lengths), seen_by_loop(rule, lengths))


@given(rule=st.sampled_from(RULES), lengths=LENGTHS, max_rows=st.integers(1, 12), step=st.integers(1, 5))
def test_strips_hold_everything_a_position_sees(rule, lengths, max_rows, step):
    sees_NN = seen_by_loop(rule, lengths)
    left_NN = sees_NN.clone()
    rows_met = []
    for strip in rule.strips(lengths, max_rows):
        assert 0 < strip.num_rows <= max_rows
        rows_met += range(strip.start, strip.end)
        low, high = strip.mixed
        assert strip.low <= low <= high <= strip.high
        assert sees_NN[strip.rows, strip.low : low].all()
        assert sees_NN[strip.rows, high : strip.high].all()
        times_NN = torch.zeros_like(sees_NN, dtype=torch.int)
        pieces = list(strip.pieces(step))
        assert pieces[0][0] == strip.rows
        for rows, columns in pieces:
            times_NN[rows, columns] += 1
            left_NN[rows, columns] = False
        assert times_NN.max() <= 1
    assert not left_NN.any()
    assert rows_met == list(range(sum(lengths)))


@given(lengths=LENGTHS, max_rows=st.integers(1, 12), step=st.integers(1, 6))
def test_segment_strips_hold_each_pair_of_segments_once(lengths, max_rows, step):
    left_NN = seen_by_loop(VisibilityRule(own_past=False, earlier=True, later=False), lengths)
    for strip in segment_strips(lengths, max_rows):
        assert strip.rows.stop - strip.rows.start <= max_rows
        computed_NN = torch.zeros_like(left_NN, dtype=torch.int)
        pieces = list(strip.pieces(step))
        assert pieces[0][0] == strip.rows
        for rows, columns in pieces:
            computed_NN[rows, columns] += 1
        assert computed_NN.max() <= 1
        for start, stop, width in strip.spans:
            assert left_NN[start:stop, :width].all()
            assert computed_NN[start:stop, :width].all()
            left_NN[start:stop, :width] = False
    assert not left_NN.any()


@pytest.mark.parametrize(("rule", "share"), [(LOCAL, 1 / 16), (LONG, 1 / 2)])
def test_what_a_rule_empties_is_not_computed(rule, share):
    lengths = [256] * 16
    pieces = [piece for strip in rule.strips(lengths, 1024) for piece in strip.pieces(64)]
    computed = sum((r.stop - r.start) * (c.stop - c.start) for r, c in pieces)
    assert computed <= (share + 0.05) * sum(lengths) ** 2


def test_short_segments_share_a_strip_and_a_long_one_is_cut():
    assert list(segment_strips([2, 2, 2, 7], 4)) == [
        SegmentStrip(((2, 4, 2), (4, 6, 4))),
        SegmentStrip(((6, 9, 6),)),
        SegmentStrip(((9, 13, 6),)),
    ]
