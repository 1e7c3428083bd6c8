"""``fairseq-hydra-train``: train.py with Hydra's sections and overrides in place of flags.

    fairseq-hydra-train task.data=data-bin/mine model=transformer_lm_gpt criterion=trime_loss dataset.max_tokens=3072
    fairseq-hydra-train --config-dir configs --config-name mine --multirun optimization.lr=1.0,0.5

The sections are made of the configs behind the flags; a run is the run of the flags that mean the same.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fairseq.option_tree import (
    CHOSEN,
    FIXED,
    NAME,
    default_names,
    names_of,
    plain_tree,
    require_key,
    require_section,
    words_of,
)
from fairseq.registry import did_you_mean
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


def store_configs() -> None:
    """Give Hydra the sections: a group of named ones for each part that is chosen, and the primary config."""
    store = ConfigStore.instance()
    for section in CHOSEN:
        for name in names_of(section):
            store.store(group=section, name=name, node=plain_tree(section, name))
    choices = [{section: name} for section, name in default_names().items()]
    fixed = {section: plain_tree(section) for section in FIXED}
    store.store(name=_CONFIG, node={"defaults": ["_self_", *choices], **fixed})


def read_overrides(argv: Sequence[str]) -> list[Override]:
    """The overrides among some arguments. Raises: ValueError for what is none."""
    words = [word for word in argv if "=" in word and not word.startswith("-")]
    try:
        return OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ValueError(f"not an override: {error}") from error


def check_overrides(overrides: Sequence[Override]) -> None:
    """Raise ValueError with the nearest name for an override of a key or part that does not exist."""
    paths = [str(override.key_or_group).partition(".") for override in overrides]
    names = {section: [name] for section, name in default_names().items()}
    for override, (section, _, key) in zip(overrides, paths):
        if section in names and not key:
            value = override.value()
            names[section] = [str(name) for name in value.list] if isinstance(value, ChoiceSweep) else [str(value)]
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


def train_tree(config: DictConfig) -> None:
    """Train by a composed config."""
    state = HydraConfig.get()
    folder = state.runtime.output_dir if state.mode == RunMode.MULTIRUN else ""

    def work(_: Sequence[str]) -> None:
        tree = OmegaConf.to_container(config, resolve=True)
        assert isinstance(tree, dict), "a config has sections"
        words = words_of({str(section): values for section, values in tree.items()})
        if folder:
            own = dict(tree.get("checkpoint") or {}).get("save_dir", "checkpoints")
            words.append(f"--save-dir={os.path.join(folder, own)}")
        train.main(words)

    run(PROGRAM, work, [])


def main(argv: Sequence[str]) -> None:
    """Compose the config, or those of a sweep, and train by each."""
    store_configs()
    overrides = read_overrides(argv)
    if "--config-name" not in argv and "-cn" not in argv:  # a file may have less, or more, and is checked as a whole
        check_overrides(overrides)
    given = {word.partition("=")[0].lstrip("+") for word in argv}
    # Overrides that do not tell the jobs of a sweep apart need not be in their folders' names.
    same = ",".join(str(override.key_or_group) for override in overrides if not override.is_sweep_override())
    more = _HYDRA | {"hydra.job.config.override_dirname.exclude_keys": f"[{same}]"}
    sys.argv = [PROGRAM, *argv, *(f"{key}={value}" for key, value in more.items() if key not in given)]
    hydra.main(version_base="1.3", config_path=None, config_name=_CONFIG)(train_tree)()


def cli_main() -> None:
    """Entry point of fairseq-hydra-train."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
