"""Scoring in the background, while the page is shown already."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fairseq.explorer.explanation import Explanation

logger = logging.getLogger(__name__)

_PAUSE = 0.0005
"""Seconds between two steps: locks go to whoever waits at the moment they are free."""


class Stopped(Exception):  # noqa: N818  no error: the program ends
    """Raised within the work of a thread that is to end."""


class Opened:
    """An explanation and the thread that fills it. Scoring ends with the ``with`` block.

    ```python
    with Opened(explanation, fill) as opened:
        opened.finish()  # or show it meanwhile
    ```
    """

    def __init__(self, explanation: Explanation, fill: Callable[[Callable[[], None]], None] | None = None) -> None:
        """``fill`` scores everything; it calls its argument between two steps, which ends it when it is to end."""
        self.explanation, self._fill = explanation, fill
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._failure: str | None = None
        self._error: Exception | None = None
        explanation.progress = lambda: self._failure
        explanation.working = lambda: self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Opened:
        if self._fill is not None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait until all is scored. Raises: what scoring raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _check(self) -> None:
        if self._stop.wait(_PAUSE):
            raise Stopped

    def _work(self) -> None:
        assert self._fill is not None
        try:
            self._fill(self._check)
        except Stopped:
            pass
        except Exception as error:
            self._error = error
            self._failure = f"Scoring stopped: {' '.join(str(error).split()) or type(error).__name__}"
            logger.error("scoring stopped", exc_info=error)
