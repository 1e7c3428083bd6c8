"""torch.compile, before and after the memory is attached, of the whole model and of a part of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny import Check, difference, expected, expected_text, random_ids, with_memory

_BACKEND = "aot_eager"
"""Traces as inductor does, without a compiler for its result."""


def run(kind: str, model: Any, store: Path) -> list[Check]:
    """The orders in which a model is compiled, called and given a memory."""
    ids_T = random_ids(11, seed=1)
    call = {"input_ids": ids_T[None], "use_cache": False}
    with torch.no_grad():
        plain = model(**call).logits[0]
        wanted, text = expected(kind, model, store, ids_T), expected_text(kind, model, store, ids_T, 4)
        found: dict[str, Any] = {}
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), backend=_BACKEND)
        compiled(**call)
        with with_memory(kind, compiled, store):
            found["compiled and called, then memory"] = compiled(**call).logits[0].log_softmax(-1)
            generated = compiled.generate(ids_T[None], max_new_tokens=4, do_sample=False)[0, 11:].tolist()
        released = compiled(**call).logits[0]
        twin = copy.deepcopy(model)
        with with_memory(kind, twin, store):
            late = torch.compile(twin, backend=_BACKEND)
            found["memory, then compiled"] = late(**call).logits[0].log_softmax(-1)
            found["memory, then compiled, called again"] = late(**call).logits[0].log_softmax(-1)
        late_released = late(**call).logits[0]
        in_place = copy.deepcopy(model)
        in_place.compile(backend=_BACKEND)
        for layer in in_place.model.layers:
            layer.compile(backend=_BACKEND)
        in_place(**call)
        with with_memory(kind, in_place, store):
            found["model.compile() and called, then memory"] = in_place(**call).logits[0].log_softmax(-1)
        torch._dynamo.reset()
    checks = [Check(what, difference(logp, wanted)) for what, logp in found.items()]
    checks.append(Check("text of a compiled model", difference(generated, text), 0))
    checks.append(Check("after the memory is gone", difference(released, plain), 1e-4))
    return [*checks, Check("compiled with the memory, after it is gone", difference(late_released, plain), 1e-4)]
