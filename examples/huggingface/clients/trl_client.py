"""trl: SFTTrainer computes its loss from the last hidden states, without logits, which a mixture needs.

A memory in the logits (kNN-LM, RetoMaton) is therefore rejected in its training loop, in each order of attaching and
with an adapter of peft. A trainer whose loss is that of transformers' Trainer trains on the mixture. A memory inside
attention works in both.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import Check, Refusal, difference, expected, random_ids, refusal, target_logp, tiny_tokenizer, with_memory

_RATE = 0.1
_TEXTS_BT = random_ids(2, 12, seed=1)


def plain_loss_trainer() -> Any:
    """SFTTrainer with the loss of the model's own ``forward``."""
    import transformers
    import trl

    class PlainLoss(trl.SFTTrainer):  # type: ignore[misc]
        """The way to train with a memory in the logits."""

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            """As transformers' Trainer does, through ``model(**inputs).loss``."""
            return transformers.Trainer.compute_loss(self, *given, **named)

    return PlainLoss


def make_trainer(kind: Any, model: Any, folder: str, **more: Any) -> Any:
    """A trainer for one step of gradient descent on two texts."""
    from datasets import Dataset
    from trl import SFTConfig

    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataset_num_proc=None,
        **{name: more.pop(name) for name in list(more) if name not in ("peft_config",)},
    )
    data = Dataset.from_dict({"input_ids": _TEXTS_BT.tolist()})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)


def step_by_hand(kind: str, model: Any, store: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weights after the step, by autograd through the expected log-probabilities."""
    twin = copy.deepcopy(model)
    parts = [target_logp(expected(kind, twin, store, ids_T), ids_T) for ids_T in _TEXTS_BT]
    loss = -torch.cat(parts).mean()
    loss.backward()
    return float(loss.detach()), {name: (w - _RATE * w.grad).detach() for name, w in twin.named_parameters()}


def run(kind: str, model: Any, store: Path) -> list[Check | Refusal]:
    """One step in each order of attaching and constructing."""
    from peft import LoraConfig
    from trl import SFTTrainer

    loss, weights = step_by_hand(kind, model, store)
    found: list[Check | Refusal] = []

    def compare(what: str, trainer: Any, twin: Any) -> None:
        told = trainer.train().training_loss
        worst = max(difference(value.detach(), weights[name]) for name, value in twin.named_parameters())
        # A log-likelihood is a sum of two texts in another order; the trainer's loss has four decimals.
        found.append(Check(f"{what}: loss", abs(told - loss), 2e-4))
        found.append(Check(f"{what}: weights after a step", worst))

    with tempfile.TemporaryDirectory() as folder:
        for checkpointing in (False, True):
            name = "PlainLoss" + (", gradient checkpointing" if checkpointing else "")
            twin = copy.deepcopy(model)
            with with_memory(kind, twin, store):
                trainer = make_trainer(plain_loss_trainer(), twin, folder, gradient_checkpointing=checkpointing)
                compare(f"memory, then {name}", trainer, twin)
            twin = copy.deepcopy(model)
            trainer = make_trainer(plain_loss_trainer(), twin, folder, gradient_checkpointing=checkpointing)
            with with_memory(kind, twin, store):
                compare(f"{name}, then memory", trainer, twin)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        for order in ("memory, then SFTTrainer", "SFTTrainer, then memory", "memory, then SFTTrainer with peft"):
            twin, more = copy.deepcopy(model), {"peft_config": lora} if "peft" in order else {}
            if order.startswith("memory"):
                with with_memory(kind, twin, store):
                    trainer = make_trainer(SFTTrainer, twin, folder, **more)
                    found += _trained_or_rejected(kind, order, trainer, twin, loss, compare, "was replaced after")
            else:
                trainer = make_trainer(SFTTrainer, twin, folder, **more)
                with with_memory(kind, twin, store):
                    found += _trained_or_rejected(kind, order, trainer, twin, loss, compare, "made no logits")
    return found


def _trained_or_rejected(
    kind: str, order: str, trainer: Any, twin: Any, loss: float, compare: Any, message: str
) -> list[Check | Refusal]:
    """A memory inside attention trains; one in the logits is rejected."""
    if kind != "extended_mind":
        return [refusal(order, message, trainer.train)]
    if "peft" in order:  # the adapter begins as nothing, so that the first loss is the same
        return [Check(f"{order}: loss", abs(trainer.train().training_loss - loss), 2e-4)]
    compare(order, trainer, twin)
    return []
