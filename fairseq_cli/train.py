"""Train a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq.data.batching_config import BatchingConfig
from fairseq.options import PrintConfig, parse_train, training_configs
from fairseq.tasks import TASKS
from fairseq.training.config import ValidationConfig
from fairseq.training.output_segments import output_samples, output_segments
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Train; the same command again resumes an interrupted run."""
    settings = parse_train(argv)
    if settings.config(PrintConfig).print_yaml:
        from omegaconf import OmegaConf

        from fairseq.option_tree import tree_of

        sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(tree_of(settings))))
        return
    batching = settings.config(BatchingConfig)
    for path, output in (
        (batching.output_segments_to_file, output_segments),
        (batching.output_samples_to_file, output_samples),
    ):
        if path is not None:
            task = settings.chosen["task"]
            split = settings.config(ValidationConfig).train_subset
            output(path, task, settings.config(TASKS[task].config), split)
            return
    configs = training_configs(settings)

    from fairseq.training.checkpoint_manager import holding_save_dir
    from fairseq.training.loop import TrainingLoop

    with holding_save_dir(configs.checkpoints):
        TrainingLoop(configs).run()


def cli_main() -> None:
    """Entry point of train.py and fairseq-train."""
    run("train.py", main)


if __name__ == "__main__":
    cli_main()
