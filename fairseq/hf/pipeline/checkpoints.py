"""Checkpoints of fine-tuning: folders that ``from_pretrained`` reads, with the state that training resumes from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from fairseq.runtime.atomic_files import naming
from fairseq.runtime.files import write_json
from fairseq.runtime.records import NUMBER, OBJECT, POSITIVE, Fields, Nullable, read_record
from fairseq.runtime.strategies.whole import WholeOnEveryProcess

_STATE = "training.ckpt"
_RECORD = "pipeline.json"
_FIX = "remove the checkpoint's folder, and training resumes from the one before"
_FIELDS = Fields({"step": POSITIVE, "signature": OBJECT, "validation_loss": Nullable(NUMBER)}, {"kept": POSITIVE})


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, by step."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step; None where there is none."""
    return next(reversed(checkpoints(folder)), None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Step, signature of the run, validation loss and the number of checkpoints kept (absent in older ones)."""
    return read_record(path / _RECORD, _FIELDS, _FIX)


def save_checkpoint(
    layout: WholeOnEveryProcess, model: Any, tokenizer: Any, folder: Path, record: Mapping[str, Any]
) -> None:
    """Write a checkpoint aside, give it its name and remove all but the last ``kept`` ones. Every rank calls this.

    Weights and the optimizer's state are whole, and the same files under every strategy.
    """
    weights, state = _whole_weights(layout, model), layout.collected(layout.optimizer_state())
    if layout.fabric.global_rank == 0:
        path = folder / f"step-{record['step']:08d}"
        aside = folder / f"{path.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        torch.save(state, aside / _STATE)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        write_json(aside / _RECORD, record)
        for file in aside.rglob("*"):
            _sync(file)
        os.replace(aside, path)
        _sync(folder)
        tidy(folder, record["kept"])
    layout.fabric.barrier()


def tidy(folder: Path, kept: int) -> None:
    """Remove all checkpoints but the last ``kept`` ones, and what a killed run wrote aside."""
    for old in checkpoints(folder)[:-kept]:
        os.replace(old, old.with_name(f"{old.name}.tmp"))  # a kill leaves no half of one under its name
    for aside in folder.glob("step-*.tmp"):
        shutil.rmtree(aside)


def _whole_weights(layout: WholeOnEveryProcess, model: Any) -> dict[str, Any]:
    """Whole weights on the first process; one tensor for names of one weight, which save_pretrained writes once."""
    weights = layout.collected(layout.weights(model))
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        weights[name] = weights[first.setdefault(id(value), name)]
    return weights  # type: ignore[no-any-return]


def restore_state(layout: WholeOnEveryProcess, path: Path) -> None:
    """Restore what a checkpoint has besides the model's own files. Raises: ValueError when it is damaged."""
    file = path / _STATE
    try:
        layout.load_optimizer_state(torch.load(file, map_location="cpu", weights_only=True))
    except (ValueError, LookupError, EOFError, RuntimeError, UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).partition(".")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged, or of another model ({reason}); {_FIX}") from error


def _sync(path: Path) -> None:
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
