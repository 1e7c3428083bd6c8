"""The model itself. Importing this module registers it, which is how lm-evaluation-harness (0.4.13) finds outside
models: it reads no entry points, and ``--include_path`` is for tasks alone.

Source: https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from fairseq.hf.lm_eval.memory import MemoryArguments, attached_memory

NAME = "fairseq-memory"


@register_model(NAME)
class MemoryLM(HFLM):  # type: ignore[misc]
    """The harness's own ``hf`` with a memory in the model; its arguments, and those of ``MemoryArguments``.

    ```python
    model = MemoryLM(pretrained="gpt2", dstore_dir="checkpoints/gpt2", k=64, lmbda=0.25)
    lm_eval.simple_evaluate(model=model, tasks=["wikitext"])
    ```
    """

    def __init__(self, pretrained: Any, **given: Any) -> None:
        """Load the model and attach its memory.

        Raises: ValueError for arguments without a memory, and when the memory does not fit.
        """
        self.memory, rest = MemoryArguments.split(given, inspect.signature(HFLM.__init__).parameters)
        super().__init__(pretrained, **rest)
        self._attached = contextlib.ExitStack()
        self._attached.enter_context(attached_memory(self.model, self.tokenizer, self.memory))

    def detach(self) -> None:
        """Take the memory out of the model."""
        self._attached.close()

    def get_model_info(self) -> dict[str, Any]:
        """The harness's facts about the model, and the memory's settings, for the record of a run."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"memory": self.memory.described()}
