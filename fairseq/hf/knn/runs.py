"""The positions of a forward call that RetoMaton reads one after the other, and the steps it makes there.

A run is a piece of one sequence without a gap. A position that follows on no other one of its run begins anew.

Shapes: B sequences, T positions, L with scores, R = B * L rows, N positions that are looked up, U runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.hf.hooks.attachment import ForwardCall
from fairseq.memory.retomaton.automaton import RetomatonStep
from fairseq.memory.types import Candidates


@dataclass(frozen=True)
class Runs:
    """The positions of a call that are looked up, run after run."""

    rows_N: Tensor
    """int64: their rows among the flat scores; on the device of the scores."""
    token_N: Tensor
    """int64: the token that comes after each; of no meaning at the end of a run without labels."""
    place_N: Tensor
    """int64: their places in their sequence, 0 to T - 1; on the host."""
    sequence_N: Tensor
    """int64: their sequences; on the host."""
    lengths: Tensor
    """int64, (U,): positions of each run; on the host."""
    sequences: Tensor
    """int64, (U,): the sequence of each run."""
    continues: Tensor
    """bool, (U,): runs that begin with the call's first position, and so continue what a cache holds."""
    num_positions: int
    """T."""
    batch_size: int
    """B."""


def find_runs(
    call: ForwardCall, logits_BLV: Tensor, rows_N: Tensor | None, target_R: Tensor | None, *, flattens: bool
) -> Runs:
    """The runs of a call.

    Args:
        rows_N: rows of the flat scores that are looked up; None for all.
        target_R: labels of all rows, which come next; None for a call without labels, where the next inputs do.
        flattens: everything is one run.
    """
    batch_size, num_scores = logits_BLV.shape[:2]
    count, device = call.num_positions(num_scores), logits_BLV.device
    place_R = call.kept(torch.arange(count).expand(batch_size, -1), num_scores).reshape(-1)
    rows_N = torch.arange(batch_size * num_scores, device=device) if rows_N is None else rows_N
    at_N = rows_N.cpu()
    place_N, sequence_N = place_R[at_N], at_N // num_scores
    begins_N = torch.ones(len(at_N), dtype=torch.bool)
    begins_N[1:] = (sequence_N.diff() != 0) | (place_N.diff() != 1)
    ids_BT = call.input_ids
    if target_R is not None:
        token_N = target_R[rows_N]
    elif ids_BT is not None:
        next_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1))
        token_N = call.kept(next_BT, num_scores).reshape(-1).to(device)[rows_N]
    else:  # the tokens of embeddings are not known
        token_N, begins_N = torch.zeros_like(rows_N), torch.ones_like(begins_N)
    starts_BT = call.starts(count)
    continues_N = place_N == 0
    if starts_BT is not None:
        starts_N = starts_BT.cpu().expand(batch_size, -1)[sequence_N, place_N]
        begins_N, continues_N = begins_N | starts_N, continues_N & ~starts_N
    if flattens:
        begins_N, continues_N = torch.zeros_like(begins_N), torch.zeros_like(continues_N)
        begins_N[:1] = True
    first_U = begins_N.nonzero()[:, 0]
    lengths = torch.cat([first_U, torch.tensor([len(at_N)])]).diff()
    return Runs(
        rows_N, token_N, place_N, sequence_N, lengths, sequence_N[first_U], continues_N[first_U], count, batch_size
    )


class StepLog:
    """Keeps the steps at the last positions of a call."""

    def __init__(self, runs: Runs, most: int) -> None:
        self._runs, self._first = runs, runs.num_positions - most
        self._numbers: list[Tensor] = []
        self._steps: list[RetomatonStep] = []

    def keep(self, place_B: Tensor, step: RetomatonStep) -> None:
        """Keep the step of some of the N positions."""
        last_N = self._runs.lengths.cumsum(0) - 1
        wanted_B = (self._runs.place_N[place_B] >= self._first) | torch.isin(place_B, last_N)
        if bool(wanted_B.any()):
            self._numbers.append(place_B[wanted_B])
            self._steps.append(_on_host(step if bool(wanted_B.all()) else step.select(wanted_B)))

    def by_length(self, length: int) -> dict[int, RetomatonStep]:
        """Steps of all sequences by the tokens in the cache up to them; it holds ``length`` after the call.

        Where a sequence is padded on the right, the step of its last token is kept for the end of the call.
        """
        if not self._steps:
            return {}
        runs, count = self._runs, self._runs.num_positions
        number_S = torch.cat(self._numbers)
        nothing = len(number_S)
        table_BT = torch.full((runs.batch_size, count), nothing)
        sequence_S, place_S = runs.sequence_N[number_S], runs.place_N[number_S]
        table_BT[sequence_S, place_S] = torch.arange(nothing)
        last_B = torch.full((runs.batch_size,), -1).scatter_reduce(0, sequence_S, place_S, "amax")
        end_B = table_BT.gather(1, last_B.clamp(min=0)[:, None])[:, 0]
        table_BT[:, -1] = torch.where(last_B < 0, nothing, end_B)
        if count == 1 and nothing == runs.batch_size and len(self._steps) == 1:
            return {length: self._steps[0]}
        steps = RetomatonStep.joined([*self._steps, RetomatonStep.empty(1)])
        kept_T = (table_BT != nothing).any(0).nonzero()[:, 0].tolist()
        return {length - count + place + 1: steps.select(table_BT[:, place]) for place in kept_T}


def _on_host(step: RetomatonStep) -> RetomatonStep:
    found = Candidates(step.found.values_NM.cpu(), step.found.scores_NM.cpu(), step.found.keep_NM.cpu())
    return RetomatonStep(found, step.rows_BM, step.searched_B)
