"""RetoMaton against the automaton in plain Python."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from automaton_reference import Automaton

from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.retomaton.automaton import Retomaton, RetomatonState
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.retomaton.reader import RetomatonReader, read_text
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Candidates, Metric, ScoredPositions

DIM, VOCAB = 4, 5  # few types: many rows hold the same token


class _StoreOfDocuments(Datastore):
    """A store in memory that knows its documents."""

    documents = Documents.unknown()


def a_store(automaton: Automaton) -> Datastore:
    deleted = np.array(sorted(automaton.deleted), np.int64)
    store = _StoreOfDocuments(
        "store", ChunkedArray.of(automaton.keys), ChunkedArray.of(automaton.values), {}, deleted=deleted
    )
    starts = sorted(automaton.starts)
    runs = np.stack([starts, np.arange(len(starts)), np.zeros(len(starts), np.int64)], 1).astype(np.int64)
    object.__setattr__(store, "documents", Documents(runs))
    return store


def a_memory(automaton: Automaton) -> Retomaton:
    store = a_store(automaton)
    index = ExactIndex(store.keys, automaton.metric, deleted=store.deleted)
    clusters = None
    if automaton.clusters:
        clusters = Clusters.of_members([np.array(rows, np.int64) for rows in automaton.clusters], len(store))
    return Retomaton(
        ExternalMemory(store, index, automaton.k),
        min_knns=automaton.min_knns,
        max_knns=automaton.max_knns,
        no_pointer=automaton.no_pointer,
        clusters=clusters,
        compat=automaton.compat,
    )


def drawn(seed: int, **more: object) -> Automaton:
    """An automaton whose every setting is drawn by chance."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(20, 60))
    rows = rng.permutation(size)
    cuts = np.sort(rng.choice(np.arange(1, size), 6, replace=False))
    settings = {
        "keys": rng.standard_normal((size, DIM), dtype=np.float32),
        "values": rng.integers(0, VOCAB, size),
        "k": int(rng.integers(1, 8)),
        "min_knns": int(rng.choice([1, 2, 5, 1000])),
        "max_knns": int(rng.choice([1, 3, 10, 100])),
        "starts": {0, *map(int, rng.choice(size, 3))},
        "deleted": set(map(int, rng.choice(size, int(rng.integers(0, 4)), replace=False))),
        "clusters": [part.tolist() for part in np.split(rows, cuts)[:-1]] if seed % 2 else [],
        "metric": list(Metric)[seed % 3],
    }
    return Automaton(**(settings | more))


def a_text(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and tokens of some sequences, and their lengths."""
    rng = np.random.default_rng(1000 + seed)
    query_ND = torch.from_numpy(rng.standard_normal((sum(lengths), DIM), dtype=np.float32))
    return query_ND, torch.from_numpy(rng.integers(0, VOCAB, sum(lengths))), torch.tensor(lengths)


class Taken:
    """Keeps what ``read_text`` hands out, by position."""

    def __init__(self) -> None:
        self.values: dict[int, list[int]] = {}
        self.scores: dict[int, list[float]] = {}

    def __call__(self, place_B: torch.Tensor, found: Candidates) -> None:
        for place, values, scores, keep in zip(place_B.tolist(), found.values_NM, found.scores_NM, found.keep_NM):
            assert place not in self.values
            self.values[place], self.scores[place] = values[keep].tolist(), scores[keep].tolist()


def same_as_reference(automaton: Automaton, memory: Retomaton, text: tuple, *, ahead: bool = False) -> None:
    query_ND, token_N, lengths_B = text
    taken = Taken()
    done = read_text(memory, query_ND, token_N, lengths_B, taken, ahead=ahead)
    first, num_searched = 0, 0
    for sequence, length in enumerate(lengths_B.tolist()):
        part = slice(first, first + length)
        offered, searches, rows = automaton.read(query_ND[part].numpy(), token_N[part].numpy())
        num_searched += sum(searches)
        for place, candidates in enumerate(offered, first):
            assert taken.values[place] == [automaton.values[row] for row, _ in candidates]
            np.testing.assert_allclose(taken.scores[place], [score for _, score in candidates], atol=1e-4)
        at_hand = done.state.rows_BP[sequence]
        assert at_hand[at_hand >= 0].tolist() == rows
        first += length
    assert done.num_searched == num_searched
    assert len(taken.values) == len(query_ND)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_automaton(seed: int) -> None:
    automaton = drawn(seed)
    same_as_reference(automaton, a_memory(automaton), a_text(seed, [7, 0, 12, 1, 7]), ahead=seed % 5 == 0)


@pytest.mark.parametrize("seed", range(12))
def test_compat_counts_a_row_as_often_as_it_is_reached_and_knows_no_documents(seed: int) -> None:
    automaton = drawn(seed, compat=True, deleted=set(), clusters=[], min_knns=3, max_knns=50)
    memory, text = a_memory(automaton), a_text(seed, [25])
    same_as_reference(automaton, memory, text)


def test_compat_does_count_rows_twice() -> None:
    repeats = 0
    for seed in range(12):
        text = a_text(seed, [25])
        offered = drawn(seed, compat=True, min_knns=3, max_knns=50).read(text[0].numpy(), text[1].numpy())[0]
        repeats += sum(len(candidates) - len({row for row, _ in candidates}) for candidates in offered)
    assert repeats > 50


def test_the_drawn_automata_do_both_follow_and_search() -> None:
    saved, searched = 0, 0
    for seed in range(40):
        automaton, text = drawn(seed), a_text(seed, [20])
        searches = automaton.read(text[0].numpy(), text[1].numpy())[1]
        saved, searched = saved + searches.count(False), searched + searches.count(True)
    assert min(saved, searched) > 100


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_is_read_alike_in_any_company(seed: int) -> None:
    memory = a_memory(drawn(seed))
    query_ND, token_N, lengths_B = a_text(seed, [9, 4, 6])
    together = Taken()
    read_text(memory, query_ND, token_N, lengths_B, together)
    first = 0
    for length in lengths_B.tolist():
        alone, part = Taken(), slice(first, first + length)
        read_text(memory, query_ND[part], token_N[part], torch.tensor([length]), alone)
        for place in range(length):
            assert alone.values[place] == together.values[first + place]
            assert alone.scores[place] == together.scores[first + place]
        first += length


def test_more_sequences_than_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq.memory.retomaton.reader._MAX_SEQUENCES", 3)
    automaton = drawn(7)
    same_as_reference(automaton, a_memory(automaton), a_text(7, [3, 8, 2, 5, 0, 4, 4, 1]))


def test_neighbours_searched_ahead_are_held_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    automaton = drawn(7)
    monkeypatch.setattr("fairseq.memory.retomaton.reader._AHEAD_BYTES", 12 * automaton.k * 9)
    memory, most = a_memory(automaton), []
    search = memory.external.neighbors
    monkeypatch.setattr(memory.external, "neighbors", lambda query_ND: most.append(len(query_ND)) or search(query_ND))
    same_as_reference(automaton, memory, a_text(7, [3, 5, 2, 5, 0, 4, 4, 1]), ahead=True)
    assert len(most) > 1
    assert max(most) <= 14  # 9, and what begins before the ninth


def test_no_position_sees_the_future() -> None:
    memory = a_memory(drawn(3, min_knns=2))
    query_ND, token_N, lengths_B = a_text(3, [12])
    before, after = Taken(), Taken()
    read_text(memory, query_ND, token_N, lengths_B, before)
    changed_ND, changed_N = query_ND.clone(), (token_N + 1) % VOCAB
    changed_ND[6:], changed_N[:5] = 0.0, token_N[:5]
    read_text(memory, changed_ND, changed_N, lengths_B, after)
    for place in range(6):  # the token after position 5 is the first that differs
        assert before.values[place] == after.values[place]
        assert before.scores[place] == after.scores[place]
    assert any(before.values[place] != after.values[place] for place in range(6, 12))


@pytest.mark.parametrize("seed", range(6))
def test_calls_one_after_another_are_one_long_call(seed: int) -> None:
    memory = a_memory(drawn(seed))
    query_ND, token_N, _ = a_text(seed, [10, 10])
    whole, parts = Taken(), Taken()
    end = read_text(memory, query_ND, token_N, torch.tensor([10, 10]), whole)
    state, num_searched = None, 0
    for at in (slice(0, 3), slice(3, 4), slice(4, 10)):
        place_N = torch.cat([torch.arange(20).view(2, 10)[row, at] for row in (0, 1)])
        each = Taken()
        lengths_B = torch.tensor([len(place_N) // 2] * 2)
        done = read_text(memory, query_ND[place_N], token_N[place_N], lengths_B, each, state)
        state, num_searched = done.state, num_searched + done.num_searched
        parts.values |= {int(place_N[place]): values for place, values in each.values.items()}
    assert parts.values == whole.values
    assert num_searched == end.num_searched
    assert state is not None
    for one, other in zip(state.rows_BP, end.state.rows_BP):
        assert one[one >= 0].tolist() == other[other >= 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_steps_by_hand_with_beams_that_change_places(seed: int) -> None:
    automaton = drawn(seed)
    memory, rng = a_memory(automaton), np.random.default_rng(seed)
    states: list[list[int]] = [[] for _ in range(3)]
    state = memory.start(3)
    for _ in range(8):
        query_BD = torch.from_numpy(rng.standard_normal((3, DIM), dtype=np.float32))
        step = memory.lookup(query_BD, state)
        offered = [automaton.candidates(query, rows) for query, rows in zip(query_BD.numpy(), states)]
        assert step.searched_B.tolist() == [searched for _, searched in offered]
        for rows_M, (candidates, _) in zip(step.rows_BM, offered):
            assert rows_M[rows_M >= 0].tolist() == [row for row, _ in candidates]
        beams, token_B = rng.integers(0, 3, 3), rng.integers(0, VOCAB, 3)
        state = memory.follow(step.select(torch.from_numpy(beams)), torch.from_numpy(token_B))
        states = [automaton.follow(offered[beam][0], int(token)) for beam, token in zip(beams, token_B)]


def test_a_state_is_a_value() -> None:
    memory = a_memory(drawn(2, max_knns=10))
    query_BD = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    step = memory.lookup(query_BD, memory.start(2))
    state = memory.follow(step, step.found.values_NM[:, 0])
    kept = state.rows_BP.clone()
    memory.follow(memory.lookup(query_BD, state), torch.tensor([0, 1]))
    assert torch.equal(state.rows_BP, kept)
    assert torch.equal(state.select(torch.tensor([1, 1, 0])).rows_BP, kept[[1, 1, 0]])
    cleared = state.reset(torch.tensor([True, False])).rows_BP
    assert (cleared[0] == -1).all()
    assert torch.equal(cleared[1], kept[1])
    assert memory.lookup(query_BD, state.reset(torch.tensor([True, True]))).searched_B.all()


def test_states_of_different_widths_are_joined() -> None:
    wide, narrow = RetomatonState(torch.tensor([[5, 6, 7]])), RetomatonState(torch.tensor([[1]]))
    assert RetomatonState.joined([narrow, wide]).rows_BP.tolist() == [[1, -1, -1], [5, 6, 7]]
    assert len(RetomatonState.joined([])) == 0


def block_logp(automaton: Automaton, text: tuple, **more: bool) -> tuple[torch.Tensor, RetomatonReader]:
    query_ND, token_N, lengths_B = text
    reader = RetomatonReader(a_memory(automaton), Interpolation(0.5), **more)
    lm_N = torch.full((len(token_N),), -2.0)
    block_N = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    out = [
        reader.logp(ScoredPositions(block_N[at], token_N[at], lm_N[at], lm_N[at], query_ND[at]))
        for at in torch.split(torch.arange(len(token_N)), int(lengths_B[:2].sum()))
    ]
    return torch.cat(out), reader


@pytest.mark.parametrize("settings", [{"no_pointer": True}, {"no_pointer": True, "min_knns": 1000}])
def test_without_pointers_it_is_knn_lm_bit_for_bit(settings: dict[str, object], products: str, threads: int) -> None:
    automaton = drawn(4, **settings)
    text = a_text(4, [6, 6, 24, 42])  # more than are searched by ways of their own; no multiple of any vector
    logp_N, reader = block_logp(automaton, text)
    found = reader.memory.external.lookup(text[0])
    lm_N = torch.full((78,), -2.0)
    assert torch.equal(logp_N, Interpolation(0.5)(lm_N, lm_N, found, text[1]))
    assert reader.num_searched == reader.num_positions == 78


def test_a_large_min_knns_searches_everywhere_and_the_rows_at_hand_come_on_top() -> None:
    automaton = drawn(6, min_knns=10**7, max_knns=50)
    query_ND, token_N, lengths_B = a_text(6, [30])
    taken = Taken()
    memory = a_memory(automaton)
    done = read_text(memory, query_ND, token_N, lengths_B, taken)
    assert done.num_searched == 30
    found = memory.external.lookup(query_ND)
    more = 0
    for place in range(30):
        assert taken.values[place][: automaton.k] == found.values_NM[place].tolist()
        more += len(taken.values[place]) - automaton.k
    assert more > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_that_carry_are_one_text(ahead: bool) -> None:
    automaton, text = drawn(8, min_knns=1, max_knns=100, k=7), a_text(8, [3] * 10)
    carried, reader = block_logp(automaton, text, carry=True, ahead=ahead)
    whole, one = block_logp(automaton, (text[0], text[1], torch.tensor([30])))
    assert torch.equal(carried, whole)
    assert reader.num_searched == one.num_searched
    assert reader.num_searched < block_logp(automaton, text, ahead=ahead)[1].num_searched


def test_a_gap_in_the_text_ends_what_is_carried() -> None:
    automaton, (query_ND, token_N, _) = drawn(8, min_knns=1), a_text(8, [10])
    reader = RetomatonReader(a_memory(automaton), Interpolation(0.5), carry=True)
    lm_N = torch.zeros(10)
    block_N = torch.tensor([0] * 5 + [2] * 5)
    together = reader.logp(ScoredPositions(block_N, token_N, lm_N, lm_N, query_ND))
    apart = [
        RetomatonReader(a_memory(automaton), Interpolation(0.5)).logp(
            ScoredPositions(block_N[at], token_N[at], lm_N[at], lm_N[at], query_ND[at])
        )
        for at in (slice(0, 5), slice(5, 10))
    ]
    assert torch.equal(together, torch.cat(apart))


def test_rows_do_not_go_on_into_another_document_or_part() -> None:
    automaton = replace(drawn(0), starts={0, 10}, deleted={5}, clusters=[], no_pointer=False, max_knns=10)
    memory = a_memory(automaton)
    last = len(automaton.values) - 1
    for row, successors in ((8, [9]), (9, []), (4, []), (last, []), (5, [6])):
        step = memory.lookup(torch.from_numpy(automaton.keys[row : row + 1]), RetomatonState(torch.tensor([[row]])))
        at = int((step.rows_BM[0] == row).nonzero()[0, 0])
        only = torch.full_like(step.rows_BM, -1)
        only[0, at] = row
        followed = memory.follow(replace(step, rows_BM=only), step.found.values_NM[:, at])
        assert followed.rows_BP[0].tolist() == successors, row


def test_clusters_of_another_store_are_refused() -> None:
    memory = a_memory(drawn(0))
    clusters = Clusters.of_assignment(np.zeros(3, np.int32), 1)
    with pytest.raises(ValueError, match="clusters of 3 rows do not fit"):
        Retomaton(memory.external, clusters=clusters)
