"""Fine-tuning on pairs with Lightning Fabric: what counts is the output, and each of its tokens weighs the same.

The pairs of a step, and so its loss, do not depend on the number of processes. A step's random numbers follow from the
seed and its number, so that a run that was killed resumes to the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from fairseq.hf.knn.batches import Batch, batches
from fairseq.hf.pipeline.checkpoints import (
    checkpoints,
    last_checkpoint,
    read_checkpoint,
    restore_state,
    save_checkpoint,
    tidy,
)
from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.dataset import Pairs, open_pairs
from fairseq.hf.pipeline.fabric import check_devices, is_deepspeed, launch, layers_of, training_layout
from fairseq.hf.pipeline.identity import config_digest, weights_digest
from fairseq.hf.pipeline.models import Base, load_model
from fairseq.memory.types import Array
from fairseq.optim import set_lr
from fairseq.optim.configs import PolynomialDecayConfig
from fairseq.optim.lr_schedulers import PolynomialDecaySchedule
from fairseq.runtime.atomic_files import require_writable, write_atomically
from fairseq.runtime.distributed import sum_over_ranks
from fairseq.runtime.files import LockedError, locked, may_create_in, parse_json
from fairseq.runtime.strategies.whole import WholeOnEveryProcess

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger(__name__)

LOG = "log.jsonl"


@dataclass(frozen=True)
class Plan:
    """Which pairs each step reads."""

    num_pairs: int
    batch_size: int
    accumulation: int
    num_epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass; the last one may be smaller."""
        return math.ceil(self.num_pairs / (self.batch_size * self.accumulation))

    @property
    def num_steps(self) -> int:
        """Steps of all passes."""
        return self.num_epochs * self.steps_per_epoch

    def batches(self, step: int) -> list[Array]:
        """Numbers of the pairs of each batch of a step; steps count from 1."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        order = _order(self.num_pairs, self.seed, epoch)[number * size : (number + 1) * size]
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]


@functools.lru_cache(maxsize=1)
def _order(num_pairs: int, seed: int, epoch: int) -> Array:
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


@dataclass(frozen=True)
class TrainingRun:
    """Result of a training run."""

    step: int
    checkpoint: Path
    validation_loss: float | None
    was_complete: bool = False
    seconds: float = 0.0


def train(config: PipelineConfig) -> TrainingRun | None:
    """Train the model of a config, or resume. None in all processes but the first.

    Raises: ValueError before the long part when the data set is missing, or the folder holds another run.
    """
    check_devices(config, trains=True)
    folder, settings = Path(config.training.out_name), config.training
    require_writable(folder, "training.out_name")
    base = Base.of(config)
    pairs, validation = (open_pairs(base.encoder, subset) for subset in ("train", "validation"))
    plan = Plan(
        len(pairs),
        config.data.train_batch_size,
        settings.gradient_accumulation_steps,
        settings.num_epochs,
        settings.seed,
    )
    if settings.warmup_steps > plan.num_steps:
        raise ValueError(
            f"training.warmup_steps {settings.warmup_steps} is more than the {plan.num_steps} steps of the run"
        )
    signature = _signature(config, base, pairs, validation)
    last = last_checkpoint(folder)
    record = None if last is None else read_checkpoint(last)
    if record is not None:
        _require_same_run(folder, record["signature"], signature)
        if record["step"] == plan.num_steps:
            _end_killed_run(folder, record)
            return TrainingRun(record["step"], last_or_fail(folder), record["validation_loss"], was_complete=True)
    model = load_model(base, str(last or base.name), _precision_of_weights(config))
    fabric = launch(config, trains=True)
    may_create_in(folder)
    is_first = fabric.global_rank == 0
    with _locked(folder) if is_first else contextlib.nullcontext():
        layout = _set_up(fabric, model, config)
        if last is not None:
            restore_state(layout, last)
        fabric.barrier()
        if is_first:
            _remove_leftovers(folder, record)
        trainer = _Trainer(config, plan, layout, model, pairs, validation)
        run = trainer.run(0 if record is None else record["step"], folder, base.tokenizer, signature)
    return run if is_first else None


def _locked(folder: Path) -> AbstractContextManager[None]:
    return locked(folder / ".train.lock", f"the checkpoints of {str(folder)!r}")


def _end_killed_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove what a run that was killed after its last checkpoint would have removed."""
    with contextlib.suppress(LockedError), _locked(folder):  # a process that holds it is about to do so
        _remove_leftovers(folder, record)


def _remove_leftovers(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Remove what a killed run left, by the record of its last checkpoint. Its own number of checkpoints counts: a
    complete run keeps them all, whatever ``training.max_num_checkpoints`` says later."""
    found = checkpoints(folder)
    tidy(folder, (record or {}).get("kept") or max(1, len(found)))


def last_or_fail(folder: Path) -> Path:
    """The last checkpoint of a run that has one."""
    found = last_checkpoint(folder)
    assert found is not None
    return found


def _signature(config: PipelineConfig, base: Base, pairs: Pairs, validation: Pairs) -> dict[str, Any]:
    """What the bits of a run follow from; strategies and numbers of devices only round differently."""
    names = ("num_epochs", "learning_rate", "warmup_steps", "gradient_accumulation_steps", "weight_decay")
    chosen = {f"training.{name}": getattr(config.training, name) for name in (*names, "max_grad_norm", "seed")}
    chosen |= {"data.train_batch_size": config.data.train_batch_size, "fabric.precision": config.fabric.precision}
    if config.training.eval_iters:
        chosen["validation data"] = validation.digest
    start = {"model.name": base.name, "weights of model.name": weights_digest(base.name, base.config)}
    return start | {"config of model.name": config_digest(base.config), "data": pairs.digest} | chosen


def _require_same_run(folder: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if name in made and made[name] != value:  # earlier releases recorded less
            raise ValueError(
                f"training.out_name {str(folder)!r} holds a run with {name} {made.get(name)!r}, now it is {value!r}; "
                "name another folder, or remove it"
            )


def _precision_of_weights(config: PipelineConfig) -> str:
    """Precision to load weights in. DeepSpeed keeps float32 ones beside those in bfloat16 that it computes with."""
    return "32-true" if is_deepspeed(config) else config.fabric.precision


def _set_up(fabric: Fabric, model: Any, config: PipelineConfig) -> WholeOnEveryProcess:
    layout, settings = training_layout(config, fabric), config.training
    is_rounded = is_deepspeed(config) and config.fabric.precision != "32-true"
    weights = {name: value.clone() for name, value in model.state_dict().items()} if is_rounded else None
    model.train()
    layout.set_up(
        model,
        layers_of(model),
        lambda: torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay),
    )
    if weights is not None:  # DeepSpeed makes its float32 weights of the rounded ones
        layout.load_weights(model, weights)
    return layout


class _Trainer:
    """The loop over steps."""

    def __init__(
        self,
        config: PipelineConfig,
        plan: Plan,
        layout: WholeOnEveryProcess,
        model: Any,
        pairs: Pairs,
        validation: Pairs,
    ) -> None:
        self.config, self.plan, self.layout, self.model, self.fabric = config, plan, layout, model, layout.fabric
        self.pairs, self.validation = pairs, validation
        warmup, rate = config.training.warmup_steps, config.training.learning_rate
        decay = PolynomialDecayConfig(warmup_updates=warmup, total_num_update=plan.num_steps + 1)
        self.schedule = PolynomialDecaySchedule(decay, (rate,))

    def run(self, done: int, folder: Path, tokenizer: Any, signature: dict[str, Any]) -> TrainingRun:
        """Train from the step after ``done``."""
        settings, started, loss = self.config.training, time.perf_counter(), None
        log = _open_log(folder / LOG, done) if self.fabric.global_rank == 0 else None
        with contextlib.closing(log) if log else contextlib.nullcontext():
            for step in range(done + 1, self.plan.num_steps + 1):
                nll, num_tokens, rate = self.step(step)
                is_last = step == self.plan.num_steps
                if step % settings.log_interval == 0 or is_last:
                    (total,) = sum_over_ranks(self.fabric, [float(nll)])
                    _log(log, {"step": step, "loss": total / num_tokens, "tokens": num_tokens, "learning_rate": rate})
                if step % settings.save_interval == 0 or is_last:
                    loss = self.validation_loss()
                    if loss is not None:
                        _log(log, {"step": step, "validation_loss": loss})
                    record = {"step": step, "signature": signature, "validation_loss": loss}
                    record["kept"] = settings.max_num_checkpoints
                    save_checkpoint(self.layout, self.model, tokenizer, folder, record)
        return TrainingRun(self.plan.num_steps, last_or_fail(folder), loss, seconds=time.perf_counter() - started)

    def step(self, step: int) -> tuple[torch.Tensor, int, float]:
        """One update. Returns this rank's sum of -log p, all ranks' tokens, and the learning rate."""
        fabric, settings, layout = self.fabric, self.config.training, self.layout
        parts = self.plan.batches(step)
        num_tokens = int(sum(self.pairs.lengths[part].sum() for part in parts))
        rate = self.schedule.lr_at(step, 0)
        set_lr(layout.optimizer, rate)
        layout.optimizer.zero_grad(set_to_none=True)
        factor = fabric.world_size / num_tokens  # gradients are averaged over ranks; theirs are parts of one sum
        total = torch.zeros((), device=fabric.device)
        for number, part in enumerate(parts):
            torch.manual_seed(_mixed_seed(settings.seed, step, number, fabric.global_rank))
            with layout.micro_batch(last=number == len(parts) - 1):
                nll = self._nll(self.pairs, part[fabric.global_rank :: fabric.world_size], part)
                layout.backward(nll, factor)
            total += nll.detach()
        layout.step(factor, settings.max_grad_norm or math.inf)
        return total, num_tokens, rate

    def validation_loss(self) -> float | None:
        """Mean of -log p over the outputs of the first validation batches; None if none are wanted."""
        size, fabric = self.config.data.eval_batch_size, self.fabric
        count = min(self.config.training.eval_iters * size, len(self.validation))
        if not count:
            return None
        parts = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
        total = torch.zeros((), device=fabric.device)
        self.layout.wrapped.eval()
        with torch.no_grad():
            for first in range(0, len(parts), fabric.world_size):
                here = parts[first : first + fabric.world_size]
                mine = here[fabric.global_rank] if fabric.global_rank < len(here) else here[0][:0]
                total += self._nll(self.validation, mine, here[0])
        self.layout.wrapped.train()
        (nll,) = sum_over_ranks(fabric, [float(total)])
        return nll / int(self.validation.lengths[:count].sum())

    def _nll(self, pairs: Pairs, mine: Array, others: Array) -> torch.Tensor:
        """Sum of -log p of this rank's pairs. A rank without any reads another's for nothing: all must take part."""
        batch = self._batch(pairs, mine if len(mine) else others[:1])
        logits_BTV = self.layout.wrapped(**batch.inputs(self.model)).logits
        nll = -batch.target_logp(logits_BTV).sum()
        return nll if len(mine) else nll * 0.0

    def _batch(self, pairs: Pairs, numbers: Sequence[int] | Array) -> Batch:
        pieces: list[Any] = [pairs.piece(number) for number in numbers]
        return next(batches(self.model, pieces, len(pieces)))


def _mixed_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def _open_log(path: Path, done: int) -> IO[str]:
    """The log, without lines of steps that are made again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            entry = parse_json(line, f"line {number} of {path}", "remove the line")
            kept += [line] if isinstance(entry, dict) and entry.get("step", 0) <= done else []
    write_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8", buffering=1)


def _log(log: IO[str] | None, entry: dict[str, Any]) -> None:
    if log is not None:
        log.write(json.dumps(entry) + "\n")
        logger.info("%s", ", ".join(f"{name} {value:.6g}" for name, value in entry.items()))
