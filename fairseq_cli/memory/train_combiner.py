"""Train a network that decides, token by token, how much the neighbours of a datastore count (adaptive kNN-MT)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.config import FlagParser, build, flag, literal_dict, to_dict
from fairseq.config.plugins import import_user_dir
from fairseq.data.batching_config import DatasetConfig, with_default_batch
from fairseq.generation.config import StepKnnConfig
from fairseq.memory.combiners.config import CombinerTrainingConfig
from fairseq.memory.index.sharded.early import begin_search
from fairseq.options import TaskChoiceConfig
from fairseq.registry import lookup
from fairseq.runtime.atomic_files import require_writable
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.tasks import TASKS
from fairseq.tasks.configs import overridden_limits
from fairseq_cli.entry import run
from fairseq_cli.generate import store_command

PROGRAM = "fairseq-train-combiner"
CONFIGS = (CombinerTrainingConfig, StepKnnConfig, RuntimeConfig, CommonConfig, DatasetConfig)


@dataclass(frozen=True, kw_only=True)
class TrainCombinerConfig:
    """Options of a combiner's training: model, text and file."""

    path: str | None = flag("--path", default=None)
    """Checkpoint of the model, which is not changed."""
    valid_subset: str = flag("--valid-subset", default="valid")
    """Split whose tokens the network is trained on; one that the datastore does not hold."""
    out: str | None = flag("--out", default=None)
    """File of the network; by default combiner-KIND.safetensors beside the checkpoint. A JSON file goes beside it."""
    knn_keytype: str | None = flag("--knn-keytype", default=None)
    """Inner state that is the query; by default model_output of a translation model, else last_ffn_input."""
    model_overrides: dict[str, Any] | None = flag("--model-overrides", default=None, parse=literal_dict)
    """Dictionary literal of model settings that replace the checkpoint's."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("--path names no checkpoint; give the file of the model")
        if not os.path.isfile(self.path):
            raise ValueError(f"--path: no checkpoint at {self.path!r}")
        if self.out is not None and not self.out.endswith(".safetensors"):
            raise ValueError(f"--out {self.out} has another ending than .safetensors; give it")

    def file_of(self, kind: str) -> str:
        """Name of the file that is written."""
        return self.out or os.path.join(os.path.dirname(str(self.path)), f"combiner-{kind}.safetensors")


def main(argv: Sequence[str]) -> None:
    """Retrieve the neighbours of a split, train on them, and print the losses on held-out sentences."""
    given, task_name = _parsed(argv)
    config, training = build(TrainCombinerConfig, given), build(CombinerTrainingConfig, given)
    runtime, data = build(RuntimeConfig, given), build(DatasetConfig, given)
    knn = build(StepKnnConfig, given)
    if not knn.dstore_filename:
        raise ValueError("give --dstore-filename PREFIX: which datastore is searched is not known otherwise")
    path = config.file_of(training.kind)
    require_writable(os.path.dirname(os.path.abspath(path)), "--out")
    begin_search(knn.search_on)

    from fairseq.checkpoint_utils import load_checkpoint
    from fairseq.generation.train_combiner import CombinerRun
    from fairseq.memory.datastore.describe import require_some_store
    from fairseq.runtime.manifest import write_manifest

    saved_by = store_command(task_name)
    require_some_store(knn.dstore_filename, saved_by)
    limits = overridden_limits(config.model_overrides)
    task = TASKS[task_name].load()(build(TASKS[task_name].config, limits | given))
    dataset = task.blocks(config.valid_subset)
    checkpoint = str(config.path)
    model = task.load_model(load_checkpoint(checkpoint), checkpoint, config.model_overrides, runtime)
    dataset = task.for_models(dataset, [model])
    batches = task.training_batches(
        dataset,
        max_tokens=data.max_tokens,
        max_sentences=data.max_sentences,
        multiple=data.required_batch_size_multiple,
        seed=runtime.seed,
        shuffle=False,
        skip_too_long=data.skip_invalid_size_inputs_valid_test,
        max_positions=model.max_positions,
    )
    tap = config.knn_keytype or ("last_ffn_input" if task.source is None else "model_output")
    work = CombinerRun(task, model, checkpoint, knn, tap, training, runtime.seed, saved_by)
    report = work.train(dataset, batches, path)
    sys.stdout.write(
        f"held-out loss of {report.num_held_out} tokens: model alone {report.model_alone:.4f}, {training.kind} "
        f"{report.best:.4f} nats per token after {report.epochs} epochs ({report.seconds:.1f}s): {path}\n"
    )
    write_manifest(
        f"{path.removesuffix('.safetensors')}.run.json",
        program=PROGRAM,
        argv=argv,
        config={"given": dict(given)},
        figures=to_dict(report),
        inputs=[checkpoint],
        seed=runtime.seed,
    )


def _parsed(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The values that the arguments give, and the task; plug-ins are imported first."""
    first = FlagParser(PROGRAM, "")
    first.add_config(RuntimeConfig)
    user_dir = first.peek(argv).get("user_dir")
    if user_dir:
        import_user_dir(user_dir)
    parser = FlagParser(PROGRAM, "Train a network that decides how much the neighbours of a datastore count.")
    parser.add_config(TaskChoiceConfig)
    task = str(parser.peek(argv).get("task", "translation"))
    for config in (lookup(TASKS, task, "--task").config, TrainCombinerConfig, *CONFIGS):
        parser.add_config(config)
    return with_default_batch(parser.parse(argv)), task


def cli_main() -> None:
    """Entry point of fairseq-train-combiner."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
