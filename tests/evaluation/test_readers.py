"""Evaluation with readers: bulks change nothing, and each reader gives what the published formula gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from brute_force import similarities
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.evaluation.loop import evaluate
from fairseq.evaluation.readers import CandidateReader
from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.combiners.joint import JointNormalization
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Candidates, LogSums, Metric, ScoredPositions

DIM, TYPES = 6, 11


class Report:
    """Stands for a PerplexityReport: keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, *columns: torch.Tensor) -> None:
        self.parts.append(columns)

    def columns(self) -> list[torch.Tensor]:
        return [torch.cat(column) for column in zip(*self.parts)]


class Scorer:
    """Stands for a language model whose batches are scored already."""

    def score(self, batch: ScoredPositions) -> ScoredPositions:
        return batch


def made_batches(sizes: list[int], seed: int = 0, *, with_sums: bool = False) -> list[ScoredPositions]:
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for number, size in enumerate(sizes):
        sums = LogSums(*torch.randn(2, size, generator=rng)) if with_sums else None
        batches.append(
            ScoredPositions(
                block_N=torch.full((size,), number),
                target_N=torch.randint(TYPES, (size,), generator=rng),
                logp_N=-torch.rand(size, generator=rng) - 0.1,
                norm_N=torch.rand(size, generator=rng),
                key_ND=torch.randn(size, DIM, generator=rng),
                text_sums=sums,
            )
        )
    return batches


class Remembered:
    """A source that searches some rows by brute force and counts its bulks."""

    def __init__(self, k: int = 5) -> None:
        rng = np.random.default_rng(1)
        self.keys, self.k = rng.standard_normal((40, DIM), dtype=np.float32), k
        self.values = torch.from_numpy(rng.integers(0, TYPES, 40))
        self.bulks: list[int] = []

    def lookup(self, query_ND: torch.Tensor) -> Candidates:
        self.bulks.append(len(query_ND))
        scores_NM = torch.from_numpy(similarities(Metric.L2, query_ND.numpy(), self.keys)).float()
        best = scores_NM.topk(self.k, dim=1)
        return Candidates(self.values[best.indices], best.values, torch.ones_like(best.indices, dtype=torch.bool))


def knn_logp_by_hand(source: Remembered, scored: ScoredPositions, n: int) -> float:
    """ln p of position n by equation 3 of arXiv 1911.00172, in float64 and one neighbour after the other."""
    distance = ((source.keys.astype(np.float64) - scored.keys[n].double().numpy()) ** 2).sum(1)
    near = np.argsort(distance, kind="stable")[: source.k]
    weight = np.exp(-(distance[near] - distance[near].min()))
    hits = [w for w, row in zip(weight, near) if int(source.values[row]) == int(scored.target_N[n])]
    return math.log(0.75 * math.exp(float(scored.logp_N[n])) + 0.25 * sum(hits) / weight.sum())


def test_the_knn_reader_is_the_published_formula() -> None:
    source, scored = Remembered(), made_batches([17])[0]
    logp_N = CandidateReader(Interpolation(0.25), source).logp(scored)
    assert logp_N.tolist() == pytest.approx([knn_logp_by_hand(source, scored, n) for n in range(17)], abs=2e-5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_bulks_change_nothing_and_are_as_large_as_asked(sizes: list[int], bulk: int) -> None:
    batches, source, report = made_batches(sizes), Remembered(), Report()
    reader = CandidateReader(Interpolation(0.3), source)
    evaluate(Scorer(), batches, report, reader, bulk)
    expected = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("block_N", "target_N")]
    block_N, target_N, logp_N = report.columns()
    assert [block_N.tolist(), target_N.tolist()] == [column.tolist() for column in expected]
    one_by_one = torch.cat([reader.logp(batch) for batch in batches])
    torch.testing.assert_close(logp_N, one_by_one, rtol=0, atol=1e-6)
    bulks = source.bulks[: len(source.bulks) - len(batches)]
    assert sum(bulks) == sum(sizes)
    assert all(size >= bulk for size in bulks[:-1])
    assert all(size < bulk + max(sizes) for size in bulks)


def test_without_a_reader_the_language_model_is_reported() -> None:
    batches, report = made_batches([3, 5]), Report()
    evaluate(Scorer(), batches, report)
    assert torch.equal(report.columns()[2], torch.cat([batch.logp_N for batch in batches]))


def test_text_memories_alone_need_no_keys() -> None:
    batches = made_batches([4, 6], with_sums=True)
    reader = CandidateReader(JointNormalization(dim=DIM))
    assert not reader.needs_keys
    seen: list[ScoredPositions] = []

    class Watching(CandidateReader):
        def logp(self, scored: ScoredPositions) -> torch.Tensor:
            seen.append(scored)
            return super().logp(scored)

    report = Report()
    evaluate(Scorer(), batches, report, Watching(reader.combine), bulk=100)
    assert [scored.key_ND for scored in seen] == [None]
    hit_N, whole_N = (torch.cat([getattr(b.text_sums, name) for b in batches]) for name in ("hit_N", "whole_N"))
    logp_N, norm_N = (torch.cat([getattr(b, name) for b in batches]).double() for name in ("logp_N", "norm_N"))
    by_hand = torch.logaddexp(logp_N + norm_N, hit_N.double()) - torch.logaddexp(norm_N, whole_N.double())
    torch.testing.assert_close(report.columns()[2].double(), by_hand, rtol=0, atol=2e-6)


def test_candidates_are_recorded_before_they_are_combined() -> None:
    source, (scored,) = Remembered(), made_batches([7])
    kept: list[tuple[ScoredPositions, Candidates]] = []
    plain = CandidateReader(Interpolation(0.3), source)
    reader = plain.with_record(lambda positions, candidates: kept.append((positions, candidates)))
    assert torch.equal(reader.logp(scored), plain.logp(scored))
    assert plain.record is None
    assert kept[0][0] is scored
    assert torch.equal(kept[0][1].values_NM, source.lookup(scored.keys).values_NM)


def test_positions_of_no_keys_are_joined_without_keys() -> None:
    batches = [replace(batch, key_ND=None) for batch in made_batches([2, 3])]
    joined = ScoredPositions.joined(batches)
    assert len(joined) == 5
    assert joined.key_ND is None
    with pytest.raises(AssertionError, match="makes none"):
        _ = joined.keys


def test_a_store_is_opened_and_mixed_in_in_three_lines(tmp_path) -> None:
    from fairseq.memory import DatastoreWriter

    source, scored = Remembered(k=4), made_batches([9], seed=2)[0]
    with DatastoreWriter(tmp_path / "store", num_rows=40, dim=DIM) as writer:
        writer.append(source.keys, source.values.numpy())
        writer.finish()
    memory = ExternalMemory.open(tmp_path / "store", k=4)
    logp_N = Interpolation(0.25)(scored.logp_N, scored.norm_N, memory.lookup(scored.keys), scored.target_N)
    assert logp_N.tolist() == pytest.approx([knn_logp_by_hand(source, scored, n) for n in range(9)], abs=2e-5)
    assert ExternalMemory.open(tmp_path / "store").k == 40
    with pytest.raises(ValueError, match="unknown metric 'l3'; known: l2, ip, cos"):
        ExternalMemory.open(tmp_path / "store", metric="l3")
    with pytest.raises(ValueError, match="no index .*; build it with build_dstore.py"):
        ExternalMemory.open(tmp_path / "store", "nowhere.index")
