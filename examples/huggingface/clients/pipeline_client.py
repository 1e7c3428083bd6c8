"""transformers' pipeline for text generation, with one text and with a padded batch of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import Check, expected_text, random_ids, tiny_tokenizer, with_memory, words_of

_NEW = 4


def run(kind: str, model: Any, store: Path) -> list[Check]:
    """A pipeline that was made before the memory was attached, and one made after."""
    from transformers import pipeline

    prompts = [random_ids(length, seed=length) for length in (5, 9, 7, 3)]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    texts = [words_of(prompt) for prompt in prompts]
    options = {"max_new_tokens": _NEW, "do_sample": False, "return_full_text": False, "eos_token_id": None}
    before = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with with_memory(kind, model, store):
        after = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        found = {
            "one at a time": before(texts, **options),
            "in a batch of three": after(texts, batch_size=3, **options),
        }
    checks = []
    for what, outputs in found.items():
        wrong = 0
        for prompt, output in zip(prompts, outputs):
            wanted = tokenizer.decode(expected_text(kind, model, store, prompt, _NEW), skip_special_tokens=True)
            wrong += output[0]["generated_text"].split() != wanted.split()
        checks.append(Check(f"texts of 4 that are others, {what}", wrong, 0))
    return checks
