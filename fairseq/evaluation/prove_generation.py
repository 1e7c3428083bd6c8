"""--prove of generate.py: checks of the distributions that texts were chosen from, while it runs.

Shapes: R rows of a step, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq.generation.next_token import mean_logp
from fairseq.memory.proof.budget import Budget
from fairseq.memory.proof.overlap import overlap
from fairseq.memory.proof.tally import CausalityTally, MassTally, OrderTally, is_in_half, rounding_of
from fairseq.memory.proof.texts import joined, other_tokens
from fairseq.memory.proof.ties import has_tied_end
from fairseq.metrics.verdicts import Proof, Verdict

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.generation.sequence_generator import Hypothesis, SequenceGenerator
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.proof.config import ProofConfig
    from fairseq.memory.sources.external import ExternalMemory


class _Step(NamedTuple):
    """What a model gives to a step of one text."""

    scores_1V: Tensor
    """Scores of the vocabulary, the temperature applied."""
    key_1D: Tensor | None


class GenerationProver:
    """Sums the distributions of some steps, and scores some texts once more, as a whole that the decoder reads at once.

    At a step nothing exists after it yet; that a score depends on nothing later is shown on the whole text, whose score
    at the step must be the one that was reported.
    """

    def __init__(
        self, config: ProofConfig, generator: SequenceGenerator, dictionary: Any, num_batches: int, seed: int
    ) -> None:
        """Args.

        dictionary: of the texts.
        num_batches: batches of the run.
        """
        self.generator, self.dictionary = generator, dictionary
        self.budget = Budget(config, num_batches, seed)
        self.mass, self.order = MassTally(is_in_half(generator.models)), OrderTally()
        self.causality = CausalityTally(rounding_of(generator.models))
        self._step, self._wanted = 0, 0
        store = self._store
        self._rows_before = 0 if store is None else len(store)

    @property
    def _memory(self) -> ExternalMemory | None:
        """The datastore that is searched; None without one."""
        memory: ExternalMemory | None = getattr(self.generator.memory, "memory", None)
        return memory

    @property
    def _store(self) -> Datastore | None:
        return None if self._memory is None else self._memory.store

    def begin(self) -> None:
        """A batch is about to be generated."""
        self._wanted = self.budget.count(self._step)
        self.generator.watch = self._see if self._wanted or self.budget.takes_all else None

    def _see(self, logp_RV: Tensor) -> None:
        """Sum the probabilities of a step: of one row, or of all."""
        with self.budget:
            rows = slice(None) if self.budget.takes_all else [int(self.budget.random.integers(len(logp_RV)))]
            self.mass.masses += logp_RV[rows].double().exp().sum(1).tolist()

    def check(self, batch: LMBatch, found: Sequence[Sequence[Hypothesis]]) -> None:
        """Check the best texts of some rows of a batch."""
        self._step += 1
        takes_all, random = self.budget.takes_all, self.budget.random
        if not takes_all and not self._wanted:
            return
        with self.budget, torch.inference_mode():
            rows = range(len(found)) if takes_all else random.integers(0, len(found), self._wanted).tolist()
            for row in rows:
                source = {name: rows_BS[row : row + 1] for name, rows_BS in batch.source.items()}
                text = found[row][0]
                count = len(text.tokens)
                for n in range(count) if takes_all else random.integers(0, count, 1).tolist():
                    self._check_step(source, text, n)

    def _check_step(self, source: dict[str, Tensor], text: Hypothesis, n: int) -> None:
        token = int(text.tokens[n])
        inputs_T = torch.cat([text.tokens.new_tensor([self.generator.eos]), text.tokens[:-1]])
        other_T = inputs_T.clone()
        first, random = self.dictionary.nspecial, self.budget.random
        other_T[n + 1 :] = other_tokens(other_T[n + 1 :], first, len(self.dictionary), random)
        now, changed = self._read(source, inputs_T, n), self._read(source, other_T, n)
        logp_V = self._logp(source, now)
        self.budget.num_positions += 1
        self.causality.num_cuts += 1
        for one, two in zip(now, changed):
            self.causality.compare("the model's scores", one.scores_1V, two.scores_1V)
            if one.key_1D is not None and two.key_1D is not None:
                self.causality.compare("the key", one.key_1D, two.key_1D)
        if not self.causality.rounding:  # a search may find another one of two neighbours at one distance
            self.causality.compare("the distribution", logp_V[None], self._logp(source, changed)[None])
        self.mass.masses.append(float(logp_V.double().exp().sum()))
        penalty = self.generator.config.unkpen if token == self.generator.unk else 0.0
        reported, own = float(text.logp[n]), float(logp_V[token]) - penalty
        if np.isfinite(reported):  # a step that may not be chosen has no score
            self.mass.compare(own, reported, lambda: any(self._is_tied(step) for step in now))

    def _is_tied(self, step: _Step) -> bool:
        memory = self._memory
        return memory is not None and step.key_1D is not None and has_tied_end(memory, step.key_1D[0])

    def _read(self, source: dict[str, Tensor], inputs_T: Tensor, n: int) -> list[_Step]:
        """Each model's scores at one step of a text that is read whole."""
        memory, temperature = self.generator.memory, self.generator.config.logit_temperature
        steps = []
        for model in self.generator.models:
            device = next(model.parameters()).device
            here = {name: rows.to(device) for name, rows in source.items()}
            out = model(inputs_T[None].to(device), None if memory is None else memory.key_tap, **here)
            scores_1V = model.vocab_scores(out.hidden_BTD[:, n])
            scores_1V = scores_1V / temperature if temperature != 1.0 else scores_1V
            steps.append(_Step(scores_1V.contiguous(), None if out.key_BTD is None else out.key_BTD[:, n]))
        return steps

    def _logp(self, source: dict[str, Tensor], steps: Sequence[_Step]) -> Tensor:
        """Log-probability of every type, the memory mixed in, (V,)."""
        memory, parts = self.generator.memory, []
        for step in steps:
            if memory is None:
                parts.append(torch.log_softmax(step.scores_1V.float(), 1)[0])
                continue
            assert step.key_1D is not None, "a key was asked for"
            here = {name: rows.to(step.key_1D.device) for name, rows in source.items()}
            scores_1V = step.scores_1V.clone()
            memory.begin(here).mix_(scores_1V, step.key_1D, torch.zeros(1, dtype=torch.int64))
            parts.append(scores_1V[0])
        return mean_logp(parts)

    def finish(self, targets: Sequence[np.ndarray[Any, Any]]) -> Proof:
        """The verdicts, once all is generated.

        Args:
            targets: tokens of each reference, </s> included; none where there is no reference.
        """
        with self.budget:
            store = self._store
            if store is not None:
                self.order.see_store(store.prefix, self._rows_before, len(store), -1)
            disjointness = self._disjointness(targets)
        verdicts = (self.mass.verdict(), self.causality.verdict(), self.order.verdict(), disjointness)
        return Proof(verdicts, self.budget.num_positions, self.budget.seconds, self.budget.share())

    def _disjointness(self, targets: Sequence[np.ndarray[Any, Any]]) -> Verdict:
        store = self._store
        if store is None:
            return Verdict("disjointness", None, "there is no datastore")
        if not targets:
            return Verdict("disjointness", None, "there are no references to look for")
        found = overlap(*joined(targets), store.values, store.deleted)
        return found.verdict(store.prefix, "sentence")
