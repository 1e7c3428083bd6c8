"""Step 3: save a datastore of the training pairs and build its index, with RetoMaton its clusters too.

python examples/pipeline/store.py [--config FILE] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from stage import Report, run_stage

from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.saving import save_store


def report(config: PipelineConfig) -> Report | None:
    """Save, or resume."""
    saved = save_store(config)
    if saved is None:
        return None
    shards = f" in {saved.num_shards} shards" if saved.num_shards > 1 else ""
    state = "is complete already" if saved.was_complete else f"is saved in {saved.seconds:.1f} seconds"
    text = f"{saved.prefix} {state}: {saved.rows} keys of width {saved.dim}{shards}\n"
    text += "".join(f"{path}\n" for path in (saved.index, saved.clusters) if path is not None)
    figures = {"rows": saved.rows, "dim": saved.dim, "shards": saved.num_shards, "seconds": saved.seconds}
    return Report(text, Path(config.knn.store_dir) / "store.run.json", figures, saved.was_complete)


if __name__ == "__main__":
    run_stage("store.py", report)
