"""Continuous batching of transformers (generate_batch): requests of several lengths that share one row of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import Check, Refusal, expected_text, random_ids, refusal, with_memory

_NEW = 4


def run(kind: str, model: Any, store: Path) -> list[Check | Refusal]:
    """Three requests at once, where the memory has no state of its own sequence."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [random_ids(length, seed=length) for length in (5, 9, 7)]
    greedy = GenerationConfig(max_new_tokens=_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Otherwise it takes most of the memory that is free, and a minute to fill it.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def generate() -> Any:
        ids = [prompt.tolist() for prompt in prompts]
        return model.generate_batch(ids, generation_config=greedy, continuous_batching_config=small)

    if kind != "knn":
        with with_memory(kind, model, store):
            return [refusal("generate_batch", "continuous batching (generate_batch)", generate)]
    with with_memory(kind, model, store):
        outputs = list(generate().values())
    wrong = 0
    for prompt, output in zip(prompts, outputs):
        wrong += list(output.generated_tokens) != expected_text(kind, model, store, prompt, _NEW)
    return [Check("texts of 3 requests that are others", wrong, 0)]
