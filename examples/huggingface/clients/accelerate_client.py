"""accelerate: models that it prepares, in half precision too, and weights that it offloads until they are used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from tiny import Check, Refusal, difference, expected, random_ids, refusal, target_logp, with_memory


def run(kind: str, model: Any, store: Path) -> list[Check | Refusal]:
    """Hooks that are there before the memory, and hooks that come after it."""
    ids_T = random_ids(11, seed=1)
    with torch.no_grad():
        checks = [*_prepared("no", kind, model, store, ids_T), *_prepared("bf16", kind, model, store, ids_T)]
        checks.append(_stripped(kind, model, store, ids_T))
        AcceleratorState._reset_state(reset_partial_state=True)
        checks += _placed(kind, model, store, ids_T)
    return [*checks, _training_step(kind, model, store, ids_T)]


def logp_of(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a call with a positional argument."""
    return model(ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def _prepared(precision: str, kind: str, model: Any, store: Path, ids_T: torch.Tensor) -> list[Check | Refusal]:
    """A model that accelerate prepares, against the same under autocast, and unwrapped against the same in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # there is one precision for a process otherwise
    accelerator, half = Accelerator(cpu=True, mixed_precision=precision), precision == "bf16"
    # Log-probabilities of eight and more have the type of the logits: bfloat16 rounds them by up to 0.03.
    allowed = 0.05 if half else 1e-4
    wanted, found = expected(kind, model, store, ids_T), []
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        wanted_half = expected(kind, model, store, ids_T).float()
    twin = accelerator.prepare(copy.deepcopy(model))
    with with_memory(kind, twin, store):
        found.append(
            Check(f"prepared ({precision}), then memory", difference(logp_of(twin, ids_T), wanted_half), allowed)
        )
    twin = copy.deepcopy(model)
    with with_memory(kind, twin, store):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted_half = logp_of(twin, ids_T) if kind == "extended_mind" else wanted_half  # of memories in float32
        prepared = accelerator.prepare(twin)
        logp = logp_of(prepared, ids_T)
        found.append(Check(f"memory, then prepared ({precision})", difference(logp, wanted_half), allowed))
        inside = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        found.append(Check(f"memory, prepared ({precision}), unwrapped", difference(logp_of(inside, ids_T), wanted)))
    return found


def _stripped(kind: str, model: Any, store: Path, ids_T: torch.Tensor) -> Check | Refusal:
    """A prepared model whose ``forward`` accelerate takes all wrappers from while it has a memory, ours too."""
    what, twin = "prepared (bf16), then memory, unwrapped", copy.deepcopy(model)
    accelerator, wanted = Accelerator(cpu=True, mixed_precision="bf16"), expected(kind, model, store, ids_T)
    if kind == "extended_mind":  # which is inside attention
        with with_memory(kind, twin, store) as mind:
            mind.detach()  # what it remembers was read in float32
            accelerator.prepare(twin)
            mind.attach()
            inside = accelerator.unwrap_model(twin, keep_fp32_wrapper=False)
            return Check(what, difference(logp_of(inside, ids_T), wanted))
    with with_memory(kind, accelerator.prepare(twin), store):
        inside = accelerator.unwrap_model(twin, keep_fp32_wrapper=False)
        return refusal(what, "was replaced after break_into", lambda: logp_of(inside, ids_T))


def _placed(kind: str, model: Any, store: Path, ids_T: torch.Tensor) -> list[Check | Refusal]:
    """Hooks that move weights and inputs to devices."""
    wanted, found = expected(kind, model, store, ids_T), []
    placed = dispatch_model(copy.deepcopy(model), {"": "cpu"}, main_device="cpu", force_hooks=True)
    with with_memory(kind, placed, store):
        found.append(Check("dispatched, then memory", difference(logp_of(placed, ids_T), wanted)))
    twin = copy.deepcopy(model)
    with with_memory(kind, twin, store):
        cpu_offload(twin, execution_device="cpu")
        found.append(Check("memory, then weights offloaded", difference(logp_of(twin, ids_T), wanted)))
        remove_hook_from_submodules(twin)
        found.append(Check("memory, offloading hooks removed", difference(logp_of(twin, ids_T), wanted)))
    away = cpu_offload(copy.deepcopy(model), execution_device="cpu")

    def attach() -> None:
        with with_memory(kind, away, store):
            pass

    return [*found, refusal("weights offloaded, then memory", "offloaded", attach)]


def _training_step(kind: str, model: Any, store: Path, ids_T: torch.Tensor) -> Check:
    """Loss and gradient of accelerator.backward, against autograd through the expected log-probabilities."""
    wanted_model = copy.deepcopy(model)
    wanted = -target_logp(expected(kind, wanted_model, store, ids_T), ids_T).mean()
    wanted.backward()
    accelerator, twin = Accelerator(cpu=True), copy.deepcopy(model)
    prepared, optimizer = accelerator.prepare(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    with with_memory(kind, prepared, store):
        loss = prepared(input_ids=ids_T[None], labels=ids_T[None]).loss
        accelerator.backward(loss)
        optimizer.step()
    by_hand = {name: value - 0.1 * value.grad for name, value in wanted_model.named_parameters()}
    worst = max(difference(value.detach(), by_hand[name].detach()) for name, value in twin.named_parameters())
    return Check("a training step", max(worst, difference(loss.detach(), wanted.detach())))
