"""peft: LoRA around or inside a model with a memory, an adapter that is switched off or merged, and prompt tuning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny import Check, difference, expected, expected_text, mixture, random_ids, with_memory


def run(kind: str, model: Any, store: Path) -> list[Check]:
    """Adapters that were there before the memory, and ones that came after it."""
    from peft import LoraConfig, get_peft_model

    ids_T, checks = random_ids(11, seed=1), []
    lora = LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0
    )
    with torch.no_grad():
        outer = get_peft_model(copy.deepcopy(model), lora).eval()
        inner = outer.get_base_model()
        checks += _forward_and_text("LoRA, then memory", kind, outer, inner, store, ids_T, outer)
        with with_memory(kind, outer, store), outer.disable_adapter():
            off = outer(input_ids=ids_T[None]).logits[0].log_softmax(-1)
        if kind != "extended_mind":  # whose memory was made with the adapter on
            checks.append(Check("adapter switched off", difference(off, expected(kind, model, store, ids_T))))
        merged = copy.deepcopy(outer).merge_and_unload()
        checks += _forward_and_text("merged LoRA", kind, merged, merged, store, ids_T, merged)
        later = copy.deepcopy(model)
        torch.manual_seed(5)
        with with_memory(kind, later, store) as memory:
            outer = get_peft_model(later, lora).eval()
            found = outer(input_ids=ids_T[None]).logits[0].log_softmax(-1)
            text = outer.generate(input_ids=ids_T[None], max_new_tokens=4, do_sample=False)[0, 11:].tolist()
            kept = list(memory.memories) if kind == "extended_mind" else None
        inner = outer.get_base_model()
        if kept is None:
            checks.append(Check("memory, then LoRA", difference(found, expected(kind, inner, store, ids_T))))
            wanted = expected_text(kind, inner, store, ids_T, 4)
            checks.append(Check("memory, then LoRA: text", difference(text, wanted), 0))
        if kind == "knn":
            checks.append(_prompt_tuning(model, store, ids_T))
    return checks


def _forward_and_text(
    what: str, kind: str, outer: Any, inner: Any, store: Path, ids_T: torch.Tensor, wrapped: Any
) -> list[Check]:
    """Logits and text through the adapter, against those of the model inside."""
    with with_memory(kind, wrapped, store):
        found = outer(input_ids=ids_T[None]).logits[0].log_softmax(-1)
        text = outer.generate(input_ids=ids_T[None], max_new_tokens=4, do_sample=False)[0, len(ids_T) :].tolist()
    return [
        Check(what, difference(found, expected(kind, inner, store, ids_T))),
        Check(f"{what}: text", difference(text, expected_text(kind, inner, store, ids_T, 4)), 0),
    ]


def _prompt_tuning(model: Any, store: Path, ids_T: torch.Tensor) -> Check:
    """Three learned vectors before the text: the scores of their places come out as well."""
    from peft import PromptTuningConfig, get_peft_model

    outer = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    wanted = mixture(outer.get_base_model(), store, ids_T, call=outer)
    with with_memory("knn", outer, store):
        found = outer(input_ids=ids_T[None]).logits[0]
        labels_T = ids_T.clone()
        loss = outer(input_ids=ids_T[None], labels=labels_T[None]).loss
    by_hand = -wanted[2 : len(ids_T) + 2].gather(1, ids_T[:, None]).mean()
    return Check("prompt tuning, logits and loss", max(difference(found, wanted), difference(loss, by_hand)))
