"""Loading transformers models by name, with mistakes in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fairseq.hf.hooks.causality import require_causal


@contextlib.contextmanager
def naming_model(name: str | None, kind: str) -> Iterator[None]:
    """Within, a model that cannot be loaded is a ValueError of one line.

    Args:
        kind: what it should be, such as "causal language model".
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{name} is no folder of a model, and it cannot be had from the hub: {_reason(error)}"
        ) from error
    except ValueError as error:  # an encoder, say; the lines that follow name all models there are
        raise ValueError(f"{name} is no {kind}: {_reason(error)}") from error
    except ImportError as error:  # a package that some tokenizers need
        raise ValueError(f"{name} cannot be loaded: {_reason(error)}") from error
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{name} has weights of other sizes than its config.json says; copy both again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{name} has damaged weights ({_reason(error)}); copy them again") from error


def _reason(error: Exception) -> str:
    """The first line of a message, and what it announces."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines if lines[0].endswith(":") else lines[:1])


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise ValueError when a tokenizer has more tokens than a model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def load_decoder(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A decoder in evaluation mode and its tokenizer; None for a folder without one.

    Args:
        name: folder, or name on the hub.
        dtype: type of the weights, or ``auto`` for that of the file.
        device: where it computes.
    Raises: ValueError when there is none, or both do not belong together.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = "causal language model"
    with naming_model(name, kind):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = model.eval().to(device)
    require_causal(model, name)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return model, None
    with naming_model(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    check_tokenizer(tokenizer, model)
    return model, tokenizer


def context_length(model: Any) -> int | None:
    """Tokens that a model reads at most, by its config; None where that states none."""
    config = model.config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@cache
def byte_values() -> dict[str, int]:
    """Bytes by the letters that byte-level BPE writes for them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {letter: byte for byte, letter in letters.items()}
