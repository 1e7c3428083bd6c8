"""Step 4: evaluate the model on the validation pairs, with and without the datastore.

python examples/pipeline/eval.py [--config FILE] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from stage import Report, run_stage

from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.evaluation import EXAMPLES, Evaluated, evaluate_pairs


def report(config: PipelineConfig) -> Report | None:
    """Evaluate, or resume."""
    done = evaluate_pairs(config)
    if done is None:
        return None
    folder = Path(config.evaluation.out_dir)
    figures = {"seconds": done.seconds, **{way: dict(values) for way, values in done.figures.items()}}
    text = f"{table(done)}{folder / EXAMPLES}\n"
    return Report(text, folder / "eval.run.json", figures, done.was_complete)


def table(done: Evaluated) -> str:
    """Figures side by side."""
    names = list(dict.fromkeys(name for values in done.figures.values() for name in values))
    lines = [f"{'':<12}" + "".join(f"{way:>12}" for way in done.figures)]
    for name in names:
        row = (values.get(name) for values in done.figures.values())
        cells = (f"{'':>12}" if x is None else f"{x:>12}" if isinstance(x, (int, str)) else f"{x:>12.3f}" for x in row)
        lines.append(f"{name:<12}" + "".join(cells))
    return "".join(f"{line.rstrip()}\n" for line in lines)


if __name__ == "__main__":
    run_stage("eval.py", report)
