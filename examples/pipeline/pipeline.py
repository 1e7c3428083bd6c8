"""All four steps, one after the other; what is done is skipped.

python examples/pipeline/pipeline.py [--config FILE] [key=value ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stage import CONFIG

from fairseq.hf.pipeline.config import read_config
from fairseq_cli.entry import run

STEPS = ("generate.py", "train.py", "store.py", "eval.py")


def main(argv: Sequence[str]) -> None:
    """Run each step as a process of its own, whose status is handed on when it fails."""
    read_config(argv, CONFIG)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("pipeline.py starts the processes of its steps itself; give fabric.devices, not torchrun")
    for step in STEPS:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name(step)), *argv], check=False)
        if done.returncode:
            sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


if __name__ == "__main__":
    run("pipeline.py", main)
