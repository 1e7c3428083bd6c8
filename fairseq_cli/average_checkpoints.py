"""``scripts/average_checkpoints.py``: one checkpoint whose weights are the mean of several."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fairseq.config import FlagParser, build, flag, require_at_least
from fairseq_cli.entry import run

if TYPE_CHECKING:
    import torch

    from fairseq.checkpoint_utils import Checkpoint

logger = logging.getLogger(__name__)

_NAMES = {"epoch": r"checkpoint(\d+)\.pt", "update": r"checkpoint_\d+_(\d+)\.pt", "best": r"checkpoint\.best_.*\.pt"}


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Options of averaging: which checkpoints, and where the result goes."""

    inputs: tuple[str, ...] = flag("--inputs", default=())
    """Checkpoints, or one folder of them together with a --num flag."""
    output: str = flag("--output", default="averaged.pt")
    """File for the averaged checkpoint."""
    num_epoch_checkpoints: int | None = flag("--num-epoch-checkpoints", default=None)
    """Average the last so many checkpoints made at ends of epochs."""
    num_update_checkpoints: int | None = flag("--num-update-checkpoints", default=None)
    """Average the last so many checkpoints made at intervals of updates."""
    num_best_checkpoints: int | None = flag("--num-best-checkpoints", default=None)
    """Average the best so many checkpoints that --keep-best-checkpoints kept, losses assumed: smaller is better."""
    checkpoint_upper_bound: int | None = flag("--checkpoint-upper-bound", default=None)
    """Leave out checkpoints of a later epoch (or update) than this one."""

    ema: bool = flag("--ema", default=False)
    """Take the moving average that --store-ema keeps in each checkpoint instead of its weights."""

    def __post_init__(self) -> None:
        counts: dict[str, int | None] = {
            "num_epoch_checkpoints": self.num_epoch_checkpoints,
            "num_update_checkpoints": self.num_update_checkpoints,
            "num_best_checkpoints": self.num_best_checkpoints,
        }
        given = [name for name, value in counts.items() if value is not None]
        if not self.inputs:
            raise ValueError("give --inputs CHECKPOINT..., or --inputs FOLDER with --num-epoch-checkpoints N")
        if len(given) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{flags} exclude each other; give one of them")
        if self.checkpoint_upper_bound is not None and self.kind not in ("epoch", "update"):
            raise ValueError("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
        if given and len(self.inputs) != 1:
            raise ValueError(f"--inputs names {len(self.inputs)} things; with a --num flag give one folder")
        require_at_least(
            1,
            num_epoch_checkpoints=self.num_epoch_checkpoints,
            num_update_checkpoints=self.num_update_checkpoints,
            num_best_checkpoints=self.num_best_checkpoints,
        )

    @property
    def kind(self) -> str | None:
        """The kind of checkpoints to look for in a folder; None if the files are named."""
        counts = (self.num_epoch_checkpoints, self.num_update_checkpoints, self.num_best_checkpoints)
        return next((kind for kind, count in zip(_NAMES, counts) if count is not None), None)

    @property
    def count(self) -> int:
        """Number of checkpoints to take from a folder."""
        return self.num_epoch_checkpoints or self.num_update_checkpoints or self.num_best_checkpoints or 0


def cli_main() -> None:
    """Entry point of scripts/average_checkpoints.py and fairseq-average-checkpoints."""
    run("average_checkpoints.py", main)


def main(argv: Sequence[str]) -> None:
    """Write the averaged checkpoint. Raises: ValueError or OSError on a user's mistake, before anything is written."""
    parser = FlagParser("average_checkpoints.py", "Average the weights of several checkpoints.")
    parser.add_config(AverageConfig)
    config = build(AverageConfig, parser.parse(argv))
    paths = find_checkpoints(config)

    from fairseq.checkpoint_utils import save_checkpoint

    logger.info("averaging %s", ", ".join(paths))
    save_checkpoint(config.output, average(paths, ema=config.ema))
    logger.info("wrote %s", config.output)


def find_checkpoints(config: AverageConfig) -> list[str]:
    """The files to average. Raises: ValueError when a folder holds too few of them."""
    if config.kind is None:
        return list(config.inputs)
    folder, kind = config.inputs[0], config.kind
    if not os.path.isdir(folder):
        raise ValueError(f"--inputs {folder} is no folder; with --num-{kind}-checkpoints give the run's --save-dir")
    hits = [(re.fullmatch(_NAMES[kind], name), name) for name in os.listdir(folder)]
    if kind == "best":
        found = sorted(((_figure(name), name) for hit, name in hits if hit))
    else:
        numbered = [(float(hit.group(1)), name) for hit, name in hits if hit]
        limit = config.checkpoint_upper_bound
        found = sorted((row for row in numbered if limit is None or row[0] <= limit), reverse=True)
    if len(found) < config.count:
        raise ValueError(
            f"{folder} holds {len(found)} checkpoints of the kind that --num-{kind}-checkpoints {config.count} asks for"
            f"{'' if config.checkpoint_upper_bound is None else ' within --checkpoint-upper-bound'}; ask for fewer"
        )
    return [os.path.join(folder, name) for _, name in found[: config.count]]


def _figure(name: str) -> float:
    """The validation figure in a name such as ``checkpoint.best_loss_3.2100.pt``."""
    hit = re.search(r"_(-?\d+\.\d+)(?:_\d+|-\d+)?\.pt$", name) or re.search(r"(-?\d+\.\d+)", name)
    return float(hit.group(1)) if hit else float("inf")


def average(paths: Sequence[str], *, ema: bool = False) -> Checkpoint:
    """The first checkpoint's settings with the mean of all weights; nothing to resume from.

    Means are computed in float64 and stored in each weight's own type; whole numbers are divided rounding down.
    Raises: ValueError when weights differ in name or shape, or a checkpoint holds no moving average (``ema``).
    """
    import torch

    from fairseq.checkpoint_utils import load_checkpoint

    first = load_checkpoint(paths[0])
    own = _weights(first, paths[0], ema)
    sums = {name: value.to(_wide(value), copy=True) for name, value in own.items()}
    for path in paths[1:]:
        weights = _weights(load_checkpoint(path), path, ema)
        differing = sorted(weights.keys() ^ sums.keys())
        if differing:
            raise ValueError(
                f"{paths[0]} and {path} differ in the weight {differing[0]}; average checkpoints of one run"
            )
        for name, value in weights.items():
            if value.shape != sums[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(sums[name].shape)} in {paths[0]} and {tuple(value.shape)} in {path}; "
                    "average checkpoints of one run"
                )
            sums[name] += value.to(sums[name].dtype)
    mean = {
        name: torch.div(value, len(paths), rounding_mode=None if value.is_floating_point() else "floor").to(
            own[name].dtype
        )
        for name, value in sums.items()
    }
    return replace(first, model=mean, optimizer=None, scheduler=None, iterator=None, progress=None)


def _weights(checkpoint: Checkpoint, path: str, ema: bool) -> Mapping[str, torch.Tensor]:
    if not ema:
        return checkpoint.model
    found: Mapping[str, torch.Tensor] | None = (checkpoint.progress or {}).get("ema")
    if not found:
        raise ValueError(f"--ema: {path} holds no moving average; train with --store-ema, or leave --ema out")
    return {**checkpoint.model, **found}  # what is no weight, such as markers of versions, is not always averaged


def _wide(value: torch.Tensor) -> torch.dtype:
    import torch

    return torch.float64 if value.is_floating_point() else torch.int64


if __name__ == "__main__":
    cli_main()
