"""--prove: checks of an evaluation's scores while it runs.

Shapes: N positions of a block, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.proof.budget import Budget
from fairseq.memory.proof.overlap import IntArray, overlap
from fairseq.memory.proof.positions import SeenPosition
from fairseq.memory.proof.tally import REPORTED, CausalityTally, MassTally, OrderTally, is_in_half, rounding_of
from fairseq.memory.proof.texts import joined, other_tokens
from fairseq.memory.proof.ties import has_tied_end
from fairseq.metrics.verdicts import Proof, Verdict
from fairseq.sequence_scorer import Inspection, SequenceScorer

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.combiners.base import Combiner
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.proof.config import ProofConfig
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.types import Candidates, MemoryReader, ScoredPositions
    from fairseq.metrics.perplexity import PerplexityReport

_CUTS = 4
"""Places of a block after which its text is changed, with --prove all."""


@dataclasses.dataclass(frozen=True)
class _State:
    """Scorer and reader, as far as the evaluation has come."""

    scorer: SequenceScorer
    reader: MemoryReader | None
    read: list[Tensor]
    """Tokens scored so far, where memories of the text take them in."""

    def copied(self) -> _State:
        """The same, to go on by itself."""
        scorer = copy.copy(self.scorer)
        scorer.text_memory = copy.deepcopy(scorer.text_memory)
        return _State(scorer, copy.copy(self.reader), list(self.read))

    def score(self, batch: LMBatch) -> _Block:
        """Score a batch of one block, from here."""
        seen = Inspection()
        return _Block(self.copied().scorer.score(batch, seen), seen, self)

    def advance(self, batch: LMBatch) -> None:
        """Go on after a batch of one block."""
        scored = self.scorer.score(batch)
        self.read.append(scored.target_N)
        if getattr(self.reader, "carry", False):
            assert self.reader is not None
            self.reader.logp(scored)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block as it was scored alone."""

    scored: ScoredPositions
    seen: Inspection
    state: _State
    """Before it."""

    def position(self, n: int, candidates: Candidates | None) -> SeenPosition:
        """What the combiner is given at position ``n``."""
        memory = self.state.scorer.text_memory
        return SeenPosition(
            self.state.scorer.vocab_logp(self.seen, n),
            self.scored.norm_N[n],
            candidates,
            [found.rows(slice(n, n + 1)) for found in self.seen.found],
            1.0 if memory is None else memory.temperature,
        )


class _Read(NamedTuple):
    """What a reader made of some positions of a block."""

    logp: list[float]
    """Log-probability of the target of each."""
    candidates: list[Candidates | None]
    """What it was offered at each."""
    earlier_N: Tensor
    """Log-probabilities of the positions before the last one, where it read these too."""


class _Checked(NamedTuple):
    """A score to be compared with the reported one."""

    block: int
    place: int
    logp: float
    key_D: Tensor | None


class EvaluationProver:
    """Scores some blocks once more, alone: as they are, and with other tokens after a position.

    Everything goes through the scorer, the memories and the combiner of the evaluation; memories of the text are copied
    at the point that the evaluation has reached.
    """

    def __init__(
        self,
        config: ProofConfig,
        evaluation: Evaluation,
        scorer: SequenceScorer,
        reader: MemoryReader | None,
        seed: int,
    ) -> None:
        self.evaluation, self.scorer, self.reader = evaluation, scorer, reader
        self.budget = Budget(config, len(evaluation.batches), seed)
        self.mass, self.order = MassTally(is_in_half(scorer.models)), OrderTally()
        decoder = [] if scorer.decoder is None else [scorer.decoder.model]
        self.causality = CausalityTally(rounding_of([*scorer.models, *decoder]))
        self._step = 0
        self._checked: list[_Checked] = []
        self._scored: list[Tensor] = []
        self._rows_before = {store.prefix: len(store) for store in self._stores()}
        self._largest_row = -1
        self._is_loaded = False

    @property
    def _carries(self) -> bool:
        """True if the reader takes a state from one block of the text to the next."""
        return bool(getattr(self.reader, "carry", False))

    def begins_bulk(self) -> bool:
        """True if the next batch must be the first of a bulk: a reader's state is known there only."""
        return self._carries and self._is_due()

    def _is_due(self) -> bool:
        return self.budget.takes_all or self.budget.count(self._step) > 0

    def before(self, batch: LMBatch) -> None:
        """Check positions of a batch that is about to be scored."""
        if batch.num_scored and self._is_due():
            self._load(batch)
            with self.budget:
                self._check(batch)
        self._step += 1
        if self.scorer.text_memory is not None:
            self._scored.append(batch.target_BT[batch.scored_BT])

    def _load(self, batch: LMBatch) -> None:
        """Let the reader load what it loads at its first search, which the evaluation needs anyway."""
        if self._is_loaded:
            return
        self._is_loaded = True
        if self._combine is not None and hasattr(self.reader, "with_record"):
            state = _State(self.scorer, self.reader, [])
            self._read(state.score(batch), [0])

    def _check(self, batch: LMBatch) -> None:
        random, takes_all = self.budget.random, self.budget.takes_all
        rows = np.arange(len(batch.ids_B))
        counts = np.bincount(random.choice(rows, self.budget.count(self._step)), minlength=len(rows))
        # What memories of the text and states hold is known at the first block of a batch, and from there on.
        is_stateful = self.scorer.text_memory is not None or self._carries
        if is_stateful:
            counts = np.where(rows == 0, counts.sum(), 0)
        state = _State(self.scorer, self.reader, self._scored)
        state = state.copied() if is_stateful else state
        for number, count in zip(batch.ids_B.tolist(), counts.tolist()):
            if not count and not takes_all:
                continue
            alone = self._check_alone(number, state, count)
            if is_stateful and takes_all:
                state.advance(alone)

    def _check_alone(self, number: int, state: _State, count: int) -> LMBatch:
        """Check so many positions of a block, or all; returns the batch of the block alone."""
        (alone,) = self.evaluation.task.iterator(self.evaluation.dataset, [np.array([number])], num_workers=0)
        num, takes_all = alone.num_scored, self.budget.takes_all
        drawn = self.budget.random.choice(num, min(num, _CUTS if takes_all else count), replace=False)
        cuts = sorted(drawn.tolist())
        self._check_block(alone, state, list(range(num)) if takes_all else cuts, set(cuts))
        return alone

    def _check_block(self, batch: LMBatch, state: _State, places: list[int], cuts: set[int]) -> None:
        base = state.score(batch)
        read = self._read(base, places)
        for n, logp, candidates in zip(places, read.logp, read.candidates):
            position = base.position(n, candidates)
            self.budget.num_positions += 1
            self._check_mass(base, n, position, logp)
            self._check_order(batch, base, n)
            if n in cuts:
                self._check_cut(batch, base, n, position)

    def _check_mass(self, base: _Block, n: int, position: SeenPosition, logp: float) -> None:
        """Sum the probabilities at a position, and compare the score with the one of that distribution."""
        key_ND = base.scored.key_ND
        self._checked.append(_Checked(int(base.scored.block_N[n]), n, logp, None if key_ND is None else key_ND[n]))
        if self._combine is not None or self.reader is None:
            own = position.logp(self._combine, base.scored.target_N[n : n + 1])
            self.mass.add(position.mass(self._combine), lambda: position.wide().mass(self._combine))
            self.mass.compare(float(own), logp)

    def _check_cut(self, batch: LMBatch, base: _Block, n: int, position: SeenPosition) -> None:
        """Score the block with other tokens after position ``n``, and compare all that comes before them."""
        other = base.state.score(self._with_other_tokens(batch, n))
        self.causality.num_cuts += 1
        self._compare(base.scored.rows(slice(0, n + 1)), other.scored.rows(slice(0, n + 1)))
        # Both are read in the same way, so that a search rounds alike; and by the same keys where others differ by
        # rounding, since of neighbours at one distance another one would be found.
        other = dataclasses.replace(other, scored=self._with_keys_of(base.scored, other.scored, n))
        before, after = self._read(base, [n]), self._read(other, [n])
        self.causality.compare("the score", before.earlier_N, after.earlier_N, lag=1)
        position = dataclasses.replace(position, candidates=before.candidates[0])
        # Their log-sums have been compared, and differ by rounding at most or fail already.
        changed = dataclasses.replace(other.position(n, after.candidates[0]), norm=position.norm)
        self.causality.compare("the model's distribution", position.lm_logp_V[None], changed.lm_logp_V[None])
        if self._combine is not None:
            target_1 = base.scored.target_N[n : n + 1]
            pair = position.logp(self._combine, target_1), changed.logp(self._combine, target_1)
            self.causality.compare("the combined distribution", *pair)

    def _with_keys_of(self, base: ScoredPositions, other: ScoredPositions, n: int) -> ScoredPositions:
        """The scores of the changed block, with the keys up to position ``n`` of the block as it is if these round."""
        if other.key_ND is None or base.key_ND is None or not self.causality.rounding:
            return other
        return dataclasses.replace(other, key_ND=torch.cat([base.key_ND[: n + 1], other.key_ND[n + 1 :]]))

    def _compare(self, base: ScoredPositions, other: ScoredPositions) -> None:
        """Compare what a block's positions up to a cut are made of; at the cut itself the target is another."""
        compare = self.causality.compare
        compare("the model's score", base.logp_N[:-1], other.logp_N[:-1], lag=1)
        compare("the model's log-sum", base.norm_N[:-1], other.norm_N[:-1], lag=1)
        # It is computed as the target's score less its log-probability, and rounds with the target.
        compare("the model's log-sum", base.norm_N[-1:], other.norm_N[-1:], rounding=REPORTED)
        if base.key_ND is not None and other.key_ND is not None:
            compare("the key", base.key_ND, other.key_ND)
        if base.text_sums is not None and other.text_sums is not None:
            compare("a memory's sum", base.text_sums.whole_N, other.text_sums.whole_N)
            compare("a memory's part", base.text_sums.hit_N[:-1], other.text_sums.hit_N[:-1], lag=1)

    @property
    def _combine(self) -> Combiner | None:
        return getattr(self.reader, "combine", None)

    def _read(self, block: _Block, places: list[int]) -> _Read:
        """Read some positions of a block, and where the reader needs them those before them too."""
        reader, scored = block.state.reader, block.scored
        if reader is None:
            logp_N = scored.logp_N
            return _Read(logp_N[places].tolist(), [None] * len(places), logp_N[: places[-1]])
        if self._combine is None or not hasattr(reader, "with_record"):  # a plug-in's: its scores can be compared
            logp_N = copy.deepcopy(reader).logp(scored).float()
            return _Read(logp_N[places].tolist(), [None] * len(places), logp_N[: places[-1]])
        offered: list[Candidates] = []

        def record(_: ScoredPositions, candidates: Candidates) -> None:
            offered.extend(candidates.rows(slice(n, n + 1)) for n in range(len(candidates.scores_NM)))

        alone = getattr(reader, "reads_alone", False)
        rows = torch.tensor(places) if alone else torch.arange(places[-1] + 1)
        logp_N = reader.with_record(record).logp(scored.rows(rows.to(scored.logp_N.device))).float()
        at = list(range(len(places))) if alone else places
        candidates = [offered[n] if offered else None for n in at]
        for row in candidates:
            if row is not None and row.rows_NM is not None and row.rows_NM.numel():
                self._largest_row = max(self._largest_row, int(row.rows_NM.max()))
        return _Read(logp_N[at].tolist(), candidates, logp_N[: 0 if alone else places[-1]])

    def _with_other_tokens(self, batch: LMBatch, n: int) -> LMBatch:
        """The batch of one block, all of whose tokens after the scored position ``n`` are others, its target too."""
        dictionary, random = self.evaluation.task.dictionary, self.budget.random
        place = int(batch.scored_BT[0].nonzero()[n])
        target_T, tokens_T = batch.target_BT[0].clone(), batch.tokens_BT[0].clone()
        target_T[place:] = other_tokens(target_T[place:], dictionary.nspecial, len(dictionary), random)
        tokens_T[place + 1 :] = target_T[place:-1]
        return dataclasses.replace(batch, tokens_BT=tokens_T[None], target_BT=target_T[None])

    def _check_order(self, batch: LMBatch, base: _Block, n: int) -> None:
        """Compare what memories of the text offer with the text before the position."""
        if not base.seen.found:
            return
        place = int(batch.scored_BT[0].nonzero()[n])
        row_T = torch.cat([batch.tokens_BT[0, 1 : place + 1], batch.target_BT[0, place : place + 1]])
        pasts = [row_T[:-1], torch.cat(base.state.read) if base.state.read else row_T[:0]]
        for found in base.seen.found:
            row = found.rows(slice(n, n + 1))
            visible_M = row.values_NM[-1][row.keep_NM[0]]
            self.order.see(visible_M, pasts, f"at token {n} of block {int(batch.ids_B[0])}")

    @property
    def _memory(self) -> ExternalMemory | None:
        """The external memory of the reader, whether it searches or follows pointers."""
        from fairseq.memory.sources.external import ExternalMemory

        found = getattr(self.reader, "source", None) or getattr(getattr(self.reader, "memory", None), "external", None)
        return found if isinstance(found, ExternalMemory) else None

    def _stores(self) -> list[Datastore]:
        memory = self._memory
        return [] if memory is None else [memory.store]

    def finish(self, report: PerplexityReport) -> Proof:
        """The verdicts, once all is scored."""
        with self.budget:
            disjointness = self._disjointness()
        self._check_skipped()
        self._check_more()
        with self.budget:
            self._compare_reported(report)
            for store in self._stores():
                self.order.see_store(store.prefix, self._rows_before[store.prefix], len(store), self._largest_row)
        if self.reader is not None and self._combine is None:
            mass = Verdict("mass", None, f"{type(self.reader).__name__} does not say what it combines")
        else:
            mass = self.mass.verdict(self._hint())
        verdicts = (mass, self.causality.verdict(), self.order.verdict(), disjointness)
        return Proof(verdicts, self.budget.num_positions, self.budget.seconds, self.budget.share())

    def _check_skipped(self) -> None:
        """Check the first batches, where their scores came from the file of --save-retrieval."""
        if self.scorer.text_memory is not None or self._carries:
            return
        batches, state = self.evaluation.batches, _State(self.scorer, self.reader, [])
        for numbers in batches[: len(batches) - self._step]:
            count = self.budget.count(self._step) if self._is_due() else 0
            self._step += 1
            chosen = numbers if self.budget.takes_all else self.budget.random.choice(numbers, count)
            with self.budget:
                for number in np.asarray(chosen).tolist():
                    self._check_alone(number, state, 1)

    def _check_more(self) -> None:
        """Check more positions if the time allows; what memories of the text and states held is gone by now."""
        if self.scorer.text_memory is not None or self._carries:
            return
        numbers = np.concatenate(self.evaluation.batches)
        while self.budget.has_rest():
            with self.budget:
                (number,) = self.budget.random.choice(numbers, 1).tolist()
                self._check_alone(number, _State(self.scorer, self.reader, []), 1)

    def _hint(self) -> str:
        """Way out where the probabilities of TRIME's evaluation sum to more than 1."""
        counts_tails = self.scorer.corrects and any(model.has_adaptive_softmax for model in self.scorer.models)
        return "--fix-tail-pads scores one type of each tail as the others" if counts_tails else ""

    def _compare_reported(self, report: PerplexityReport) -> None:
        """Compare the scores of the blocks alone with those that the figures are of."""
        block_N, _, logp_N = report.arrays()
        for one in self._checked:
            reported = float(logp_N[int(np.searchsorted(block_N, one.block)) + one.place])
            self.mass.compare(one.logp, reported, functools.partial(self._is_tied, one.key_D))

    def _is_tied(self, key_D: Tensor | None) -> bool:
        memory = self._memory
        return memory is not None and key_D is not None and has_tied_end(memory, key_D)

    def _disjointness(self) -> Verdict:
        stores = self._stores()
        if not stores:
            return Verdict("disjointness", None, "there is no datastore")
        dataset = self.evaluation.dataset.dataset
        numbers = np.sort(np.concatenate(self.evaluation.batches))
        token_N, starts = joined([dataset.target(int(number)) for number in numbers])
        unit, starts = _documents(dataset.blocks, numbers, starts)
        found = overlap(token_N, starts, stores[0].values, stores[0].deleted)
        return found.verdict(stores[0].prefix, unit)


def _documents(blocks: Any, numbers: IntArray, starts: IntArray) -> tuple[str, IntArray]:
    """What the documents of some blocks are, and where they begin among their tokens; a text that is one has blocks."""
    if blocks.document_unit != "document":
        return "block", starts
    document = np.searchsorted(blocks.document_starts(), blocks.starts[numbers], side="right")
    return "document", starts[np.r_[True, np.diff(document) != 0]]
