"""Step 1: tokenise the pairs of ``data.train_path`` and ``data.val_path`` into Arrow files.

python examples/pipeline/generate.py [--config FILE] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from stage import Report, is_first_process, run_stage

from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.dataset import SUBSETS, count_pairs, write_pairs
from fairseq.hf.pipeline.models import Base
from fairseq.runtime.atomic_files import require_writable


def generate(config: PipelineConfig) -> Report | None:
    """Write the data set of each subset. None in all processes but the first, which does it alone."""
    if not is_first_process():
        return None
    folder = Path(config.data.dataset_dir)
    require_writable(folder, "data.dataset_dir")
    encoder = Base.of(config).encoder
    paths = dict(zip(SUBSETS, map(Path, (config.data.train_path, config.data.val_path))))
    rows = {subset: count_pairs(path, config.data) for subset, path in paths.items()}
    text, figures, was_complete = "", {}, True
    for subset, path in paths.items():
        written = write_pairs(encoder, path, folder / subset, rows[subset])
        state = "is complete already" if written.was_complete else "is written"
        full = (
            f"; {written.full} texts fill data.max_input_length or max_output_length and may be cut"
            if written.full
            else ""
        )
        text += f"{folder / subset} {state}: {written.rows} pairs{full}\n"
        figures[subset] = {"pairs": written.rows, "full": written.full}
        was_complete = was_complete and written.was_complete
    return Report(text, folder / "generate.run.json", figures, was_complete, [str(path) for path in paths.values()])


if __name__ == "__main__":
    run_stage("generate.py", generate)
