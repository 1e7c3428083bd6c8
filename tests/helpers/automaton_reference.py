"""What RetoMaton is compared with: the automaton of arXiv 2201.12431 in plain Python, one position after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from brute_force import similarities

from fairseq.memory.types import Metric


@dataclass
class Automaton:
    """A store in memory, and how it is followed."""

    keys: np.ndarray
    values: np.ndarray
    k: int
    min_knns: int = 1
    max_knns: int = 1024
    no_pointer: bool = False
    starts: set[int] = field(default_factory=lambda: {0})
    """First rows of documents."""
    deleted: set[int] = field(default_factory=set)
    clusters: Sequence[Sequence[int]] = ()
    compat: bool = False
    metric: Metric = Metric.L2

    def candidates(self, query: np.ndarray, at_hand: Sequence[int]) -> tuple[list[tuple[int, float]], bool]:
        """(row, score) of each candidate, and whether a search was needed."""
        score = similarities(self.metric, query[None], self.keys)[0]
        searched = len(at_hand) < self.min_knns
        alive = [row for row in range(len(self.keys)) if row not in self.deleted]
        found = sorted(alive, key=lambda row: (-score[row], row))[: self.k] if searched else []
        joined = list(found)
        for row in at_hand:
            if self.compat or row not in joined:
                joined.append(row)
        return [(row, float(score[row])) for row in joined], searched

    def follow(self, candidates: Sequence[tuple[int, float]], token: int) -> list[int]:
        """The rows at hand after a token."""
        if self.no_pointer:
            return []
        held = sorted((c for c in candidates if self.values[c[0]] == token), key=lambda c: -c[1])
        out: list[int] = []
        for row, _ in held:
            successor = row + 1
            starts = set() if self.compat else self.starts
            if successor == len(self.values) or successor in starts | self.deleted:
                continue
            if self.compat or successor not in out:
                out.append(successor)
        out = out[: self.max_knns]
        seen = []
        for row in list(out):
            cluster = next((number for number, members in enumerate(self.clusters) if row in members), None)
            if cluster is None or cluster in seen:
                continue
            seen.append(cluster)
            for member in sorted(self.clusters[cluster]):
                if member not in self.deleted and (self.compat or member not in out):
                    out.append(member)
        return out[: self.max_knns]

    def read(
        self, queries: np.ndarray, tokens: np.ndarray, at_hand: Sequence[int] = ()
    ) -> tuple[list[list[tuple[int, float]]], list[bool], list[int]]:
        """The candidates and searches of each position of one sequence, and the rows at hand in the end."""
        offered, searches, rows = [], [], list(at_hand)
        for query, token in zip(queries, tokens):
            candidates, searched = self.candidates(query, rows)
            offered.append(candidates)
            searches.append(searched)
            rows = self.follow(candidates, int(token))
        return offered, searches, rows
