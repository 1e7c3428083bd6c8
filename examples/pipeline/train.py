"""Step 2: fine-tune ``model.name`` on the pairs, with Lightning Fabric.

python examples/pipeline/train.py [--config FILE] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from stage import Report, run_stage

from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.training import train


def report(config: PipelineConfig) -> Report | None:
    """Train, or resume."""
    done = train(config)
    if done is None:
        return None
    loss = "" if done.validation_loss is None else f", validation loss {done.validation_loss:.4f}"
    state = "is complete already" if done.was_complete else f"is trained in {done.seconds:.1f} seconds"
    figures = {"step": done.step, "validation_loss": done.validation_loss, "seconds": done.seconds}
    text = f"{done.checkpoint} {state}: {done.step} steps{loss}\n"
    return Report(text, Path(config.training.out_name) / "train.run.json", figures, done.was_complete)


if __name__ == "__main__":
    run_stage("train.py", report)
