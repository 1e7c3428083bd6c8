"""What the four programs share: the config, one report on standard output, and a run manifest beside what was made."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from fairseq.config.trees import plain_tree
from fairseq.hf.pipeline.config import PipelineConfig, read_config
from fairseq.runtime.files import read_json
from fairseq.runtime.manifest import write_manifest
from fairseq_cli.entry import run

CONFIG = Path(__file__).parent / "configs" / "main.yaml"


@dataclass(frozen=True)
class Report:
    """Result of a stage."""

    text: str
    """For standard output."""
    manifest: Path
    figures: dict[str, Any]
    was_complete: bool
    """Nothing was left to do."""
    inputs: list[str] = field(default_factory=list)
    """Files that were read."""


def run_stage(program: str, work: Callable[[PipelineConfig], Report | None]) -> None:
    """Run a stage on the config that the command line gives; ``work`` returns None in processes that report nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(program, functools.partial(_main, program, work))


def is_first_process() -> bool:
    """False for all but the first of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _is_recorded(report: Report) -> bool:
    """True if the manifest is of this result; a run may have been killed before it wrote its own."""
    if not report.manifest.exists():
        return False
    try:
        held = read_json(report.manifest).get("figures")
    except ValueError:
        return False
    return isinstance(held, dict) and all(held.get(n) == v for n, v in report.figures.items() if n != "seconds")


def _main(program: str, work: Callable[[PipelineConfig], Report | None], argv: Sequence[str]) -> None:
    config = read_config(argv, CONFIG)
    report = work(config)
    if report is None:
        return
    sys.stdout.write(report.text)
    if not report.was_complete or not _is_recorded(report):
        write_manifest(
            report.manifest,
            program=program,
            argv=argv,
            config=plain_tree(config),
            figures=report.figures,
            inputs=report.inputs,
            seed=config.training.seed,
        )
