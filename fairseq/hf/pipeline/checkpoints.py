"""Checkpoints of fine-tuning: folders that ``from_pretrained`` reads, with the state that training resumes from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fairseq.runtime.atomic_files import naming
from fairseq.runtime.files import write_json
from fairseq.runtime.records import NUMBER, OBJECT, POSITIVE, Fields, Nullable, read_record

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_STATE = "training.ckpt"
_RECORD = "pipeline.json"
_FIELDS = Fields({"step": POSITIVE, "signature": OBJECT, "validation_loss": Nullable(NUMBER)})


@dataclass(frozen=True)
class Trained:
    """A model in training."""

    raw: Any
    """The transformers model."""
    model: Any
    """The same as Fabric has set it up."""
    optimizer: Any
    strategy: str
    """``ddp``, ``fsdp`` or ``deepspeed``: who holds the state."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, by step."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step; None where there is none."""
    return next(reversed(checkpoints(folder)), None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Step, signature of the run and validation loss of a checkpoint."""
    return read_record(path / _RECORD, _FIELDS, "remove the checkpoint's folder, and training resumes from the last")


def save_checkpoint(
    fabric: Fabric, trained: Trained, tokenizer: Any, folder: Path, record: Mapping[str, Any], keep: int
) -> None:
    """Write a checkpoint aside, give it its name and remove the oldest ones. Every rank calls this."""
    path = folder / f"step-{record['step']:08d}"
    aside = folder / f"{path.name}.tmp"
    is_first = fabric.global_rank == 0
    if is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    fabric.barrier()
    if trained.strategy == "ddp":
        weights = trained.raw.state_dict()
        if is_first:
            torch.save(trained.optimizer.state_dict(), aside / _STATE)
    else:
        fabric.save(aside / _STATE, {"model": trained.model, "optimizer": trained.optimizer})
        weights = _gathered_weights(aside / _STATE, trained.strategy) if is_first else {}
    if is_first:
        trained.raw.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        write_json(aside / _RECORD, record)
        for file in aside.rglob("*"):
            _sync(file)
        os.replace(aside, path)
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f"{old.name}.tmp")  # a kill leaves no half of one under its name
            os.replace(old, gone)
            shutil.rmtree(gone)
    fabric.barrier()


def restore_state(fabric: Fabric, trained: Trained, path: Path) -> None:
    """Restore what a checkpoint has besides the model's own files."""
    if trained.strategy == "ddp":
        trained.optimizer.load_state_dict(torch.load(path / _STATE, map_location="cpu", weights_only=True))
    else:
        fabric.load(path / _STATE, {"model": trained.model, "optimizer": trained.optimizer})


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run wrote aside."""
    for aside in folder.glob("step-*.tmp"):
        shutil.rmtree(aside)


def _gathered_weights(state: Path, strategy: str) -> dict[str, Any]:
    """All weights of a model that no process holds whole, from its saved state."""
    if strategy == "fsdp":
        found: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)["model"]
        return found
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(state), tag="checkpoint"))


def _sync(path: Path) -> None:
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
