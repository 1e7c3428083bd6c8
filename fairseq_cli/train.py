"""Train a language model."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq.options import check_train, parse_train
from fairseq.training.output_segments import output_segments
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Train as the words say; the same words again go on with a run that was stopped."""
    settings = parse_train(argv)
    if output_segments(settings):
        return
    check_train(settings)

    from fairseq.training.loop import TrainingLoop

    TrainingLoop(settings).run()


def cli_main() -> None:
    """Entry point of train.py and fairseq-train."""
    run("train.py", main)


if __name__ == "__main__":
    cli_main()
