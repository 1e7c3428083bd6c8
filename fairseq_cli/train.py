"""Train a language model."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq.data.batching_config import BatchingConfig
from fairseq.options import parse_train, training_configs
from fairseq.tasks import TASKS
from fairseq.training.config import ValidationConfig
from fairseq.training.output_segments import output_segments
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Train; the same command again resumes an interrupted run."""
    settings = parse_train(argv)
    segments = settings.config(BatchingConfig).output_segments_to_file
    if segments is not None:
        task = settings.chosen["task"]
        split = settings.config(ValidationConfig).train_subset
        output_segments(segments, task, settings.config(TASKS[task].config), split)
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
