"""train.py --output-segments-to-file: the training blocks as text, for bm25_search.py."""

from __future__ import annotations

import sys

from fairseq.tasks import TASKS
from fairseq.tasks.configs import LanguageModelingConfig


def output_segments(path: str, task_name: str, task_config: LanguageModelingConfig, split: str) -> None:
    """Write a split's blocks in corpus order, so that a block's number is its segment's id.

    Raises: ValueError when there are several data folders: their blocks' numbers are not one another's.
    """
    from fairseq.data.segments import write_segments

    task = TASKS[task_name].load()(task_config)
    if len(task.folders) > 1:
        raise ValueError(
            f"--output-segments-to-file numbers the blocks of one data folder, {len(task.folders)} are given; give "
            f"{task.folders[0]!r} alone"
        )
    dataset = task.blocks(split)
    count = write_segments(path, dataset.blocks, task.dictionary)
    sys.stdout.write(f"wrote {count} segments of at most {int(dataset.sizes.max(initial=0))} tokens: {path}\n")
