"""What the experiments share: loading a model, confidence intervals, greedy answers, results on disk."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq.runtime.atomic_files import writing


def load_model(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of ``settings["model"]``, in ``settings["dtype"]`` (float32)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    return model.to(settings.get("device", "cpu")).eval(), tokenizer


def context_of(model: Any) -> int:
    """Tokens the model reads at once."""
    return int(getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "max_seq_len", 2048))


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], num_tokens: int, **call: Any) -> list[str]:
    """The likeliest continuation of each prompt, token by token."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(
        **batch, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **call
    )
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[no-any-return]


def is_correct(answer: str | Sequence[str], text: str) -> bool:
    """Whether the text holds the answer, or any of several, whatever the case."""
    answers = [answer] if isinstance(answer, str) else answer
    return any(each.lower() in text.lower() for each in answers)


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson's score interval, 95 % by default)."""
    if not count:
        return 0.0, 1.0
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # The bounds of none and of all are exact; sums of roundings would be just beyond them.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; only line feeds end a line, other separators may stand in its strings."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def rows_so_far(record: Path) -> list[dict[str, Any]]:
    """What an earlier run wrote, a JSON object a line; a line that it was killed in is cut off."""
    whole = record.read_bytes() if record.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    if record.exists():
        os.truncate(record, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def write_results(path: Path, results: Any) -> None:
    """Write JSON, whole or not at all, with where and when it was made."""
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        json.dump({"made": time.strftime("%Y-%m-%d %H:%M"), "with": about, "results": results}, file, indent=1)
        file.write("\n")
