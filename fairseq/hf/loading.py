"""Loading transformers models by name, with mistakes in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def naming_model(name: str | None, kind: str) -> Iterator[None]:
    """Within, a model that cannot be loaded is a ValueError of one line.

    Args:
        kind: what it should be, such as "causal language model".
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder of a model, and it cannot be had from the hub: {reason}") from error
    except ValueError as error:  # an encoder, say; the lines that follow name all models there are
        raise ValueError(f"{name} is no {kind}: {str(error).strip().splitlines()[0]}") from error


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise ValueError when a tokenizer has more tokens than a model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")
