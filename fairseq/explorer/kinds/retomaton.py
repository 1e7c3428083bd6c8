"""How a RetoMaton came by the candidates of each token: by a search, or by following pointers.

Shapes: B sequences, N positions, M candidates of a step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.reading import Found
from fairseq.explorer.text_table import TableWriter
from fairseq.memory.retomaton.automaton import Retomaton, RetomatonStep
from fairseq.memory.retomaton.reader import read_text
from fairseq.memory.types import Array, Candidates


class StepRecord:
    """Keeps the steps of an automaton in a table."""

    def __init__(self, writer: TableWriter, places_N: Array) -> None:
        """``places_N`` are the places in the table of the positions that are read."""
        self.writer, self.places_N = writer, places_N

    def __call__(self, place_B: Tensor, step: RetomatonStep) -> None:
        """Keep a step of some positions, by their numbers among those that are read."""
        places = self.places_N[place_B.numpy()]
        assert step.pointers_B is not None, "a step of its own was kept"
        self.writer.write(places, searched=step.searched_B.numpy(), pointers=step.pointers_B.numpy())
        self.writer.write_candidates(places, step.found, step.rows_BM)


def look_up_text(memory: Retomaton, key_ND: Tensor, next_N: Tensor) -> Found:
    """Candidates of the positions of one text, given its keys and the tokens that come next."""
    count = len(key_ND)
    steps: list[tuple[int, RetomatonStep]] = []

    def keep(place_B: Tensor, step: RetomatonStep) -> None:
        steps.append((int(place_B[0]), step))

    read_text(memory, key_ND, next_N.to(key_ND.device), torch.tensor([count]), _use_nothing, keep=keep)
    joined = RetomatonStep.joined([step for _, step in sorted(steps, key=lambda item: item[0])])
    pointers = [step.pointers_B for _, step in sorted(steps, key=lambda item: item[0])]
    pointers_N = torch.from_numpy(np.concatenate([np.asarray(each) for each in pointers]))
    return Found(joined.found, joined.rows_BM, joined.searched_B, pointers_N)


def _use_nothing(place_B: Tensor, candidates: Candidates) -> None:
    """The step is kept whole."""
