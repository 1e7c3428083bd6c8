"""Write the datastore of a translation model: the state and the next token of every target position of a split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.config import FlagParser, build, flag, ignored_flags, literal_dict
from fairseq.config.plugins import import_user_dir
from fairseq.data.batching_config import DatasetConfig, with_default_batch
from fairseq.memory.sources.config import KnnConfig
from fairseq.runtime.atomic_files import require_writable
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.tasks.configs import TranslationConfig
from fairseq_cli.entry import run

PROGRAM = "save_datastore.py"


@dataclass(frozen=True, kw_only=True)
class SaveDatastoreConfig:
    """Options of the datastore that is written."""

    path: str | None = flag("--path", default=None)
    """Checkpoint of the model."""
    valid_subset: str = flag("--valid-subset", default="train")
    """Split whose target positions become rows."""
    dstore_mmap: str | None = flag("--dstore-mmap", default=None)
    """Folder of the datastore, which gets keys.npy and vals.npy."""
    knn_keytype: str = flag("--knn-keytype", default="model_output")
    """Inner state of the decoder that is the key."""
    model_overrides: dict[str, Any] | None = flag("--model-overrides", default=None, parse=literal_dict)
    """Dictionary literal of model settings that replace the checkpoint's."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("--path names no checkpoint; give the file of the model")
        if not os.path.isfile(self.path):
            raise ValueError(f"--path: no checkpoint at {self.path!r}")
        if not self.dstore_mmap:
            raise ValueError("give --dstore-mmap FOLDER: where the datastore goes")
        if "," in self.valid_subset:
            raise ValueError(f"--valid-subset {self.valid_subset} names several splits; a datastore is of one")


def main(argv: Sequence[str]) -> None:
    """Save; the same command again resumes an interrupted save."""
    parser = FlagParser(PROGRAM, "Write the datastore of a translation model.")
    for config_class in (TranslationConfig, SaveDatastoreConfig, KnnConfig, RuntimeConfig, CommonConfig, DatasetConfig):
        parser.add_config(config_class)
    for name, (takes_value, _) in ignored_flags.GENERATE.items():
        parser.add_ignored(name, takes_value=bool(takes_value))
    parser.add_ignored("--task", takes_value=True)
    given = with_default_batch(parser.parse(argv))
    parser.pop_ignored(given)
    config, runtime, data = build(SaveDatastoreConfig, given), build(RuntimeConfig, given), build(DatasetConfig, given)
    knn = build(KnnConfig, given)
    folder = str(config.dstore_mmap)
    require_writable(folder, "--dstore-mmap")
    if runtime.user_dir:
        import_user_dir(runtime.user_dir)

    from fairseq.checkpoint_utils import load_checkpoint
    from fairseq.generation.save_datastore import StoreText, require_rows, save_pairs
    from fairseq.runtime.manifest import write_manifest
    from fairseq.tasks.translation import TranslationTask

    task = TranslationTask(build(TranslationConfig, given))
    dataset = task.blocks(config.valid_subset)
    model = task.load_model(load_checkpoint(str(config.path)), str(config.path), config.model_overrides, runtime)
    batches = task.training_batches(
        dataset,
        max_tokens=data.max_tokens,
        max_sentences=data.max_sentences,
        multiple=data.required_batch_size_multiple,
        seed=runtime.seed,
        shuffle=config.valid_subset != "test",  # as fairseq orders its splits
        skip_too_long=data.skip_invalid_size_inputs_valid_test,
        max_positions=model.max_positions,
    )
    text = StoreText(task, config.valid_subset, dataset, batches)
    require_rows(text, knn.dstore_size)
    os.makedirs(folder, exist_ok=True)
    prefix = os.path.join(folder, "")
    rows = save_pairs(text, model, str(config.path), prefix, knn.key_dtype, config.knn_keytype)
    write_manifest(
        os.path.join(folder, "datastore.run.json"),
        program=PROGRAM,
        argv=argv,
        config={"given": dict(given)},
        figures={"rows": rows},
        inputs=[str(config.path), *(f"{prefix}.bin" for prefix in task.prefixes(config.valid_subset))],
        seed=runtime.seed,
    )


def cli_main() -> None:
    """Entry point of save_datastore.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
