"""Validate a trained model: the figures that its own criterion reports on other splits or data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fairseq.config import FlagParser, build, flag, literal_dict, require_at_least
from fairseq.config.plugins import import_user_dir
from fairseq.data.batching_config import DatasetConfig, with_default_batch
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.tasks.configs import GRAPH_TASK, GraphStoresConfig, graph_options, overridden_limits
from fairseq_cli.entry import run


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Options of a validation."""

    data: str = flag("data")
    """Folder made by preprocess.py."""
    path: str | None = flag("--path", default=None)
    """Checkpoint."""
    valid_subset: str = flag("--valid-subset", default="valid")
    """Splits, separated by commas."""
    max_valid_steps: int | None = flag("--max-valid-steps", "--nval", default=None)
    """Read only the first so many batches of each split."""
    model_overrides: dict[str, Any] | None = flag("--model-overrides", default=None, parse=literal_dict)
    """Dictionary literal of model settings that replace the checkpoint's."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("--path names no checkpoint; give the file to validate")
        require_at_least(1, max_valid_steps=self.max_valid_steps)


def main(argv: Sequence[str]) -> None:
    """Report the figures of each split."""
    parser = FlagParser("fairseq-validate", "Validate a trained model by the criterion it was trained with.")
    for config in (ValidateConfig, GraphStoresConfig, RuntimeConfig, CommonConfig, DatasetConfig):
        parser.add_config(config)
    given = with_default_batch(parser.parse(argv))
    validation, runtime = build(ValidateConfig, given), build(RuntimeConfig, given)
    data, common = build(DatasetConfig, given), build(CommonConfig, given)
    if runtime.user_dir:
        import_user_dir(runtime.user_dir)
    build(GraphStoresConfig, given)  # an impossible value is told before anything is loaded
    stated = {field.name: given[field.name] for field in fields(GraphStoresConfig) if field.name in given}
    _validate(validation, runtime, data, common, stated)


def _validate(
    config: ValidateConfig, runtime: RuntimeConfig, data: DatasetConfig, common: CommonConfig, stated: Mapping[str, Any]
) -> None:
    import torch

    from fairseq.checkpoint_utils import load_checkpoint, load_model_for
    from fairseq.compat.checkpoints import settings_of
    from fairseq.compat.tasks import setup_task
    from fairseq.criterions.base import build_criterion
    from fairseq.metrics.training import valid_figures
    from fairseq.runtime.distributed import runs_on_gpu
    from fairseq.trainer import sum_logs
    from fairseq.training.progress import Progress

    path = str(config.path)
    checkpoint = load_checkpoint(path)
    trained = checkpoint.config.get("task", {})
    graph = graph_options(trained, stated, config.model_overrides, path)
    if graph is None:  # a GNN-LM that is taken without its graph reads text alone
        graph = {"task": "language_modeling"} if trained.get("name") == GRAPH_TASK else {}
    settings = settings_of(checkpoint, {"data": config.data, **overridden_limits(config.model_overrides), **graph})
    task = setup_task(settings)
    device = torch.device("cuda" if runs_on_gpu(runtime) else "cpu")
    model = load_model_for(task.dictionary, checkpoint, path, config.model_overrides, task.source).to(device).eval()
    name = checkpoint.config.get("chosen", {}).get("criterion")
    name = name or ("adaptive_loss" if model.has_adaptive_softmax else "cross_entropy")
    task.attach([model], trains=False)
    task.check_checkpoint(path, trained)
    criterion, progress = build_criterion(name, vars(settings), model, task), Progress(common)
    for subset in config.valid_subset.split(","):
        dataset = task.for_models(task.blocks(subset), [model])
        batches = task.batches(dataset, data, seed=runtime.seed, max_positions=model.max_positions)
        began = time.perf_counter()
        read = itertools.islice(iter(task.iterator(dataset, batches, num_workers=0)), config.max_valid_steps)
        with torch.inference_mode():
            sums = sum_logs([criterion(model, batch.to(device)).log for batch in read])
        done = int((checkpoint.progress or {}).get("num_updates", 0))
        figures = valid_figures(sums, time.perf_counter() - began, done, criterion.figures)
        progress.validated(subset, int((checkpoint.iterator or {}).get("epoch", 1)), figures)
    progress.close()


def cli_main() -> None:
    """Entry point of validate.py and fairseq-validate."""
    run("fairseq-validate", main)


if __name__ == "__main__":
    cli_main()
