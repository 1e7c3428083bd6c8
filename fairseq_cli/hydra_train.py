"""``fairseq-hydra-train``: train.py with Hydra's sections and overrides in place of flags.

    fairseq-hydra-train task.data=data-bin/mine model=transformer_lm_gpt criterion=trime_loss dataset.max_tokens=3072
    fairseq-hydra-train --config-dir configs --config-name mine --multirun optimization.lr=1.0,0.5

The sections are made of the configs behind the flags; a run is the run of the flags that mean the same.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fairseq import options
from fairseq.option_tree import (
    CHOSEN,
    FIXED,
    NAME,
    default_names,
    names_of,
    plain_tree,
    require_key,
    require_section,
    tree_of,
    words_of,
)
from fairseq.registry import did_you_mean
from fairseq.runtime.files import may_create_in, read_json, write_json
from fairseq_cli import train
from fairseq_cli.entry import run

PROGRAM = "fairseq-hydra-train"
_CONFIG = "config"
# A run of its own writes where it is started, as train.py does; each job of --multirun has a folder named after its
# overrides, so that the same sweep resumes its jobs.
_HYDRA = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "multirun",
    "hydra.sweep.subdir": "${hydra.job.override_dirname}",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
_JOB = "job.json"
# What a job of a sweep may go on with: other limits, intervals, processes and logs.
_GOES_ON = {"checkpoint", "distributed_training", "optimization.max_update", "optimization.max_epoch"}
_GOES_ON |= {"optimization.stop_time_hours", "optimization.stop_min_lr"}
# Of these sections, what the weights follow from.
_TRAINED_BY = {
    "dataset": {
        *("max_tokens", "max_sentences", "required_batch_size_multiple", "keep_order", "train_mem_size"),
        *("predefined_batches", "train_subset", "curriculum"),
    },
    "common": {"seed", "fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "fp16_init_scale"},
}


def store_configs() -> None:
    """Give Hydra the sections: a group of named ones for each part that is chosen, and the primary config."""
    store = ConfigStore.instance()
    for section in CHOSEN:
        for name in names_of(section):
            store.store(group=section, name=name, node=plain_tree(section, name))
    choices = [{section: name} for section, name in default_names().items()]
    fixed = {section: plain_tree(section) for section in FIXED}
    store.store(name=_CONFIG, node={"defaults": ["_self_", *choices], **fixed})


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str], str | None]:
    """Overrides, Hydra's flags with their values, and that of --config-name, of arguments in any order.

    Raises: ValueError for a flag that Hydra does not know, or a value that it does not take.
    """

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows Hydra's flags, and options of train.py are given as SECTION.KEY=...")

    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(list(argv))
    left, flags = list(given.overrides), []
    for word in argv:
        if left and word == left[0]:
            left.pop(0)
        else:
            flags.append(word)
    return given.overrides, flags, given.config_name


def read_overrides(words: Sequence[str]) -> list[Override]:
    """Parse overrides. Raises: ValueError for what is none."""
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise ValueError(f"not an override: {str(error).partition('See https')[0].strip()}") from error


def check_overrides(overrides: Sequence[Override]) -> None:
    """Raise ValueError with the nearest name for an override of a key or part that does not exist."""
    paths = [str(override.key_or_group).partition(".") for override in overrides]
    names = {section: [name] for section, name in default_names().items()}
    for override, (section, _, key) in zip(overrides, paths):
        if section in names and not key:
            names[section] = _names_in(override)
            for name in names[section]:
                if name not in names_of(section):
                    raise ValueError(f"{section}: unknown name {name}{did_you_mean(name, names_of(section))}")
    choices = [dict(zip(names, some)) for some in itertools.product(*names.values())]
    for override, (section, _, key) in zip(overrides, paths):
        if section == "hydra" or section.startswith("hydra/") or override.is_add() or override.is_delete():
            continue
        require_section(section)
        if key and key != NAME:
            require_key(section, key, choices)


def task_words(overrides: Sequence[Override]) -> list[str]:
    """The override that chooses the task of the model, as train.py does, where the user chose none.

    Raises: ValueError for a sweep over models of different tasks.
    """
    chosen, usual = {str(override.key_or_group): override for override in overrides}, default_names()["task"]
    if "task" in chosen or "model" not in chosen:
        return []
    models = _names_in(chosen["model"])
    tasks = list(dict.fromkeys(options.task_for(name, usual) for name in models))
    if len(tasks) > 1:
        raise ValueError(
            f"model={','.join(models)} sweeps over models of {' and '.join(tasks)}; give a sweep for each task"
        )
    return [] if tasks == [usual] else [f"task={tasks[0]}"]


def _names_in(override: Override) -> list[str]:
    """Names that an override gives to a part: one, or those of a sweep."""
    value = override.value()
    return [str(name) for name in value.list] if isinstance(value, ChoiceSweep) else [str(value)]


def train_tree(config: DictConfig) -> None:
    """Train by a composed config."""
    state = HydraConfig.get()
    folder = state.runtime.output_dir if state.mode == RunMode.MULTIRUN else ""

    def work(_: Sequence[str]) -> None:
        tree = OmegaConf.to_container(config, resolve=True)
        assert isinstance(tree, dict), "a config has sections"
        words = words_of({str(section): values for section, values in tree.items()})
        if folder:
            own = Path(folder, dict(tree.get("checkpoint") or {}).get("save_dir", "checkpoints"))
            note_job(Path(folder), own, words)
            words.append(f"--save-dir={own}")
        train.main(words)

    run(PROGRAM, work, [])


def note_job(folder: Path, save_dir: Path, words: Sequence[str]) -> None:
    """Record the settings of a job of a sweep in its folder, whose name has only the overrides that tell jobs apart.

    Raises: ValueError when the folder holds a job with other settings, but for those that it may go on with.
    """
    settings = _settings_of(words)
    held = _held_settings(folder, save_dir)
    for path in sorted(settings.keys() | held.keys()) if held is not None else ():
        one, other = (each.get(path, "the default") for each in (held or {}, settings))
        if one != other and not _may_change(path):
            raise ValueError(
                f"{folder} holds a job with {path} {one}, now it is {other}; name another hydra.sweep.dir, sweep over "
                "it, or remove the folder"
            )
    may_create_in(folder)
    write_json(folder / _JOB, {"settings": settings})


def _held_settings(folder: Path, save_dir: Path) -> dict[str, Any] | None:
    """Settings of the job in a folder; earlier releases recorded those of finished ones only."""
    finished = save_dir / "train.run.json"
    if (folder / _JOB).exists():
        return dict(read_json(folder / _JOB).get("settings") or {})
    return _settings_of(shlex.split(read_json(finished)["command"])[1:]) if finished.exists() else None


def _settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Path -> value of the options that differ from their defaults, as JSON has them."""
    tree = tree_of(options.parse_train(list(words)))
    found = {f"{section}.{key}": value for section, here in tree.items() for key, value in here.items()}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _may_change(path: str) -> bool:
    section, _, key = path.partition(".")
    if section in _TRAINED_BY:
        return key not in _TRAINED_BY[section]
    return section in _GOES_ON or path in _GOES_ON


def main(argv: Sequence[str]) -> None:
    """Compose the config, or those of a sweep, and train by each."""
    store_configs()
    words, flags, config_name = split_words(argv)
    overrides = read_overrides(words)
    if config_name is None:  # a file may have less, or more, and is checked as a whole
        words = [*words, *task_words(overrides)]
        overrides = read_overrides(words)
        check_overrides(overrides)
    given = {word.partition("=")[0].lstrip("+") for word in words}
    # Overrides that do not tell the jobs of a sweep apart need not be in their folders' names.
    same = ",".join(str(override.key_or_group) for override in overrides if not override.is_sweep_override())
    more = _HYDRA | {"hydra.job.config.override_dirname.exclude_keys": f"[{same}]"}
    sys.argv = [PROGRAM, *(f"{key}={value}" for key, value in more.items() if key not in given), *words, *flags]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function instead of standard error
    try:
        hydra.main(version_base="1.3", config_path=None, config_name=_CONFIG)(train_tree)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(str(error).strip().partition("\n\n")[0]) from error


def cli_main() -> None:
    """Entry point of fairseq-hydra-train."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
