"""Takes what passes a tap during a forward call, and always lets go of the model again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fairseq.hf.hooks.taps import Tap


class Capture:
    """Holds the latest tensor that passed a tap, until it is taken; each thread has its own."""

    def __init__(self, tap: Tap, on_pass: Callable[[], None] | None = None) -> None:
        """Begin to capture; ``on_pass`` is called whenever something passes."""
        self.tap, self._on_pass = tap, on_pass
        self._captured = threading.local()
        if tap.takes_input:
            self._handle = tap.module.register_forward_pre_hook(self._see_input, with_kwargs=True)
        else:
            self._handle = tap.module.register_forward_hook(self._see_output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """Itself: a copy of the model is tapped by the same capture."""
        return self

    def clear(self) -> None:
        """Forget what an earlier call that failed may have left."""
        self._captured.value = None

    def take(self, batch_size: int) -> Tensor:
        """The keys of a forward call, (B, T, D), detached; some layers put all sequences into one row before the tap.

        Raises: ValueError when the call did not pass the tap.
        """
        captured: Tensor | None = getattr(self._captured, "value", None)
        self._captured.value = None
        if captured is None:
            raise ValueError(
                f"the forward call did not pass {self.tap.path} ({type(self.tap.module).__name__}), where keys of "
                f"{self.tap.kind.value} come from; use another key type, for example final_hidden. If this part of the "
                "model was compiled by torch.compile, wrap the model before you compile it"
            )
        return captured.view(batch_size, -1, captured.shape[-1]) if captured.ndim != 3 else captured

    def remove(self) -> None:
        """Leave the model as it was; what was captured may still be taken."""
        self._handle.remove()

    def _see_input(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._hold(inputs[0] if inputs else next(iter(named.values())))

    def _see_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        self._hold(output[0] if isinstance(output, tuple) else output)  # a mixture of experts returns its routing too

    def _hold(self, value: Tensor) -> None:
        self._captured.value = value.detach()
        if self._on_pass is not None:
            self._on_pass()


@contextmanager
def capture_key(tap: Tap) -> Iterator[Capture]:
    """Capture at a tap while the block runs."""
    capture = Capture(tap)
    try:
        yield capture
    finally:
        capture.remove()
