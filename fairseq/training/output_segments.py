"""train.py --output-segments-to-file: the training blocks as text, for bm25_search.py."""

from __future__ import annotations

import sys

from fairseq.data.batching_config import BatchingConfig
from fairseq.options import Settings
from fairseq.training.config import ValidationConfig


def output_segments(settings: Settings) -> bool:
    """Write the training split's blocks in corpus order, so that a block's number is its segment's id.

    Returns whether that was asked for.
    Raises: ValueError when there are several data folders: their blocks' numbers are not one another's.
    """
    path = settings.config(BatchingConfig).output_segments_to_file
    if path is None:
        return False
    from fairseq.data.segments import write_segments
    from fairseq.tasks import TASKS

    entry = TASKS[settings.chosen["task"]]
    task = entry.load()(settings.config(entry.config))
    if len(task.folders) > 1:
        raise ValueError(
            f"--output-segments-to-file numbers the blocks of one data folder, {len(task.folders)} are given; give "
            f"{task.folders[0]!r} alone"
        )
    dataset = task.blocks(settings.config(ValidationConfig).train_subset)
    count = write_segments(path, dataset.blocks, task.dictionary)
    sys.stdout.write(f"wrote {count} segments of at most {int(dataset.sizes.max(initial=0))} tokens: {path}\n")
    return True
