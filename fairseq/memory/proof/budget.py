"""How much is proved: positions spread over a run, so many as are asked for, or as the time allows."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fairseq.memory.proof.config import ProofConfig

SHARE = 0.012
"""Of the time that has gone by, while a run goes on; what is known only at its end, such as searches, comes on top."""

REST_SHARE = 0.017
"""Of the whole time, once it is known."""
MOST = 256
"""Positions after which the time allows no more: a fault that so many miss is none of a formula."""


class Budget:
    """Decides at each step of a run, such as a batch, how many positions are checked there, and takes the time.

    ```python
    budget = Budget(ProofConfig(prove="8"), num_steps=len(batches))
    for number, batch in enumerate(batches):
        with budget:
            check(batch, budget.count(number))
    ```
    """

    def __init__(
        self, config: ProofConfig, num_steps: int, seed: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Args.

        num_steps: steps of the run.
        clock: seconds.
        """
        self.random = np.random.default_rng(seed)
        """Draws the positions."""
        self._config, self._clock = config, clock
        self._counts = np.zeros(max(1, num_steps), np.int64)
        if config.count is not None:
            np.add.at(self._counts, self.random.integers(0, len(self._counts), config.count), 1)
        # One at least, wherever it falls: a short run is over before the time allows any.
        self._one_at = int(self.random.integers(0, len(self._counts)))
        self._started = clock()
        self._since: float | None = None
        self.seconds = 0.0
        """Time spent on proofs."""
        self.num_positions = 0
        """Positions checked."""
        self._position_seconds, self._positions_before = 0.0, 0

    @property
    def takes_all(self) -> bool:
        """True if every position is checked."""
        return self._config.takes_all

    def count(self, step: int) -> int:
        """Positions to check at a step; with ``takes_all`` the number means nothing."""
        if self._config.count is not None:
            return int(self._counts[step])
        if step == self._one_at:
            return 1
        return int(self.seconds < SHARE * (self._clock() - self._started) and self.num_positions > 0)

    def has_rest(self) -> bool:
        """True at the end of a run if the time allows another position, at the mean cost of those before."""
        if self._config.count is not None or self.takes_all or not 0 < self.num_positions < MOST:
            return False
        cost = self._position_seconds / self.num_positions
        return self.seconds + cost < REST_SHARE * (self._clock() - self._started)

    def __enter__(self) -> Budget:
        self._since, self._positions_before = self._clock(), self.num_positions
        return self

    def __exit__(self, *_: object) -> None:
        assert self._since is not None
        spent = self._clock() - self._since
        self.seconds += spent
        if self.num_positions > self._positions_before:
            self._position_seconds += spent
        self._since = None

    def share(self) -> float:
        """Time spent over the time gone by."""
        return self.seconds / max(self._clock() - self._started, 1e-9)
