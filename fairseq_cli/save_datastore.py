"""Write the datastore of a translation model: the state and the next token of every target position of a split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.config import FlagParser, build, flag, ignored_flags, literal_dict
from fairseq.data.batching_config import DatasetConfig, with_default_batch
from fairseq.generation.config import StepKnnConfig
from fairseq.options import add_ignored, import_plugins, warn_ignored
from fairseq.runtime.atomic_files import require_writable
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.tasks.configs import TranslationConfig, overridden_limits
from fairseq_cli.entry import run

PROGRAM = "save_datastore.py"

CONFIGS = (TranslationConfig, StepKnnConfig, RuntimeConfig, CommonConfig, DatasetConfig)
IGNORED = ignored_flags.GENERATE | {"--task": (1, "a store of this command is always of translations")}


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
    overwrite_dstore: bool = flag("--overwrite-dstore", default=False)
    """Replace a complete datastore, also one of another split, model, key or text."""

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
    import_plugins(PROGRAM, argv)
    parser = FlagParser(PROGRAM, "Write the datastore of a translation model.")
    for config_class in (SaveDatastoreConfig, *CONFIGS):
        parser.add_config(config_class)
    add_ignored(parser, IGNORED)
    given = with_default_batch(parser.parse(argv))
    warn_ignored(parser, given, IGNORED)
    config, runtime, data = build(SaveDatastoreConfig, given), build(RuntimeConfig, given), build(DatasetConfig, given)
    knn = build(StepKnnConfig, given)
    folder = str(config.dstore_mmap)
    require_writable(folder, "--dstore-mmap")

    from fairseq.checkpoint_utils import load_checkpoint
    from fairseq.generation.save_datastore import StorePlace, StoreText, facts_of, require_rows, save_pairs
    from fairseq.memory.datastore.layout import side_file
    from fairseq.memory.datastore.metadata import is_saved
    from fairseq.runtime.manifest import write_manifest
    from fairseq.tasks.translation import TranslationTask

    task = TranslationTask(build(TranslationConfig, overridden_limits(config.model_overrides) | given))
    dataset = task.blocks(config.valid_subset)
    prefix, path = os.path.join(folder, ""), str(config.path)
    place = StorePlace(prefix, path, config.knn_keytype, knn.key_dtype, config.model_overrides, config.overwrite_dstore)
    facts = facts_of(task, config.valid_subset, place)
    is_saved(prefix, place.dtype, facts, overwrite=place.overwrite)
    model = task.load_model(load_checkpoint(path), path, config.model_overrides, runtime)
    dataset = task.for_models(dataset, [model])
    shuffle = config.valid_subset != "test"  # as fairseq orders its splits
    batches = task.batches(dataset, data, seed=runtime.seed, max_positions=model.max_positions, shuffle=shuffle)
    text = StoreText(task, config.valid_subset, dataset, batches)
    require_rows(text, knn.dstore_size)
    os.makedirs(folder, exist_ok=True)
    manifest = side_file(prefix, "run.json")
    if not save_pairs(text, model, place, facts) and os.path.exists(manifest):
        return  # it tells of the command that saved the store
    write_manifest(
        manifest,
        program=PROGRAM,
        argv=argv,
        config={"given": dict(given)},
        figures={"rows": text.num_rows},
        inputs=[path, *(f"{name}.bin" for name in task.prefixes(config.valid_subset))],
        seed=runtime.seed,
    )


def cli_main() -> None:
    """Entry point of save_datastore.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
