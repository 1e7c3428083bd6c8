"""``fairseq.checkpoint_utils`` of scripts: models and their task from checkpoint files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, load_model_for
from fairseq.compat.samples import FairseqModel
from fairseq.compat.tasks import setup_task
from fairseq.config import Namespace

_OF_THE_TASK = ("data", "task", "tokens_per_sample", "sample_break_mode", "add_bos_token", "max_target_positions")


def settings_of(checkpoint: Checkpoint, overrides: Mapping[str, Any] | None = None) -> Namespace:
    """The settings of a checkpoint as fairseq's flat ``args``; overrides win."""
    found: dict[str, Any] = {}
    for group in ("given", "chosen", "model", "task"):
        found |= {str(name): value for name, value in checkpoint.config.get(group, {}).items()}
    found["task"] = found.pop("name", "language_modeling")
    return Namespace(**(found | dict(overrides or {})))


def load_checkpoint_to_cpu(path: str, arg_overrides: Mapping[str, Any] | None = None, **more: object) -> dict[str, Any]:
    """A checkpoint as fairseq's dictionary with ``args``, ``cfg`` and ``model``. Raises: as load_checkpoint."""
    found = load_checkpoint(path)
    return {"args": settings_of(found, arg_overrides), "cfg": found.config, "model": found.model}


def load_model_ensemble_and_task(
    filenames: Sequence[str], arg_overrides: Mapping[str, Any] | None = None, task: Any = None, **more: object
) -> tuple[list[FairseqModel], Namespace, Any]:
    """Models, the settings of the last one, and their task.

    Args:
        filenames: checkpoints.
        arg_overrides: settings that replace theirs, such as ``{"data": "data-bin/wikitext-103"}``.
        task: whose dictionary the models are for; made of the first checkpoint's settings by default.
    Raises: ValueError or OSError for a file that is missing, damaged, or of another dictionary.
    """
    if not filenames:
        raise ValueError("no checkpoint is named; give at least one file")
    overrides = dict(arg_overrides or {})
    of_the_model = {name: value for name, value in overrides.items() if name not in _OF_THE_TASK}
    models = []
    for path in filenames:
        checkpoint = load_checkpoint(path)
        settings = settings_of(checkpoint, overrides)
        task = setup_task(settings) if task is None else task
        models.append(FairseqModel(load_model_for(task.dictionary, checkpoint, path, of_the_model)))
    return models, settings, task


def load_model_ensemble(
    filenames: Sequence[str], arg_overrides: Mapping[str, Any] | None = None, task: Any = None, **more: object
) -> tuple[list[FairseqModel], Namespace]:
    """As :func:`load_model_ensemble_and_task`, without the task."""
    models, settings, _ = load_model_ensemble_and_task(filenames, arg_overrides, task)
    return models, settings
