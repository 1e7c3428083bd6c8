"""The configs that make up each command, and fairseq's way of choosing parts by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fairseq.config import FlagParser, build, flag, flag_names, ignored_flags
from fairseq.config.plugins import import_user_dir
from fairseq.criterions import CRITERIONS
from fairseq.data.batching_config import BatchingConfig, DatasetConfig, with_default_batch
from fairseq.evaluation.config import (
    BulkConfig,
    EvaluationConfig,
    EvaluationConfigs,
    MemoryDecoderEvaluationConfig,
    MemoryEvaluationConfig,
    TrimeEvaluationConfig,
)
from fairseq.fairseq_names import lazy
from fairseq.memory.proof.config import ProofConfig
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.memory.sources.config import KnnConfig
from fairseq.models.architectures import ARCHITECTURES, GNN, build_model_config, model_config_class, model_name
from fairseq.models.config import key_tap as parse_tap
from fairseq.optim import LR_SCHEDULERS, OPTIMIZERS
from fairseq.optim.configs import EmaConfig, OptimizationConfig
from fairseq.registry import Entry, lookup
from fairseq.runtime.config import CommonConfig, DistributedConfig, RuntimeConfig
from fairseq.runtime.manifest import Command
from fairseq.tasks import TASKS
from fairseq.tasks.configs import GRAPH_TASK, GraphLanguageModelingConfig, GraphStoresConfig
from fairseq.training.config import CheckpointConfig, TrainingConfigs, ValidationConfig

logger = logging.getLogger(__name__)
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class ChoicesConfig:
    """The parts of a training run that are chosen by name; each brings its own flags."""

    task: str = flag("--task", default="language_modeling")
    """Kind of data and model."""
    arch: str = flag("--arch", "-a", default="transformer_lm")
    """Named model size."""
    criterion: str = flag("--criterion", default="cross_entropy")
    """Training loss."""
    optimizer: str = flag("--optimizer", default="nag")
    """Update rule."""
    lr_scheduler: str = flag("--lr-scheduler", default="fixed")
    """Learning rate schedule."""


@dataclass(frozen=True, kw_only=True)
class PrintConfig:
    """What train.py shows instead of training."""

    print_yaml: bool = flag("--print-yaml", default=False)
    """Print the options as fairseq-hydra-train's YAML, and exit."""


@dataclass(frozen=True, kw_only=True)
class TaskChoiceConfig:
    """The task, where nothing else is chosen by name."""

    task: str = flag("--task", default="language_modeling")
    """Kind of data and model."""


@dataclass(frozen=True)
class Settings:
    """A parsed command line: its arguments and the values they gave (defaults are absent).

    Rooms below this module get configs, never this.
    """

    program: str
    argv: tuple[str, ...]
    given: Mapping[str, Any]
    chosen: Mapping[str, str]

    def config(self, config_class: type[C], **more: Any) -> C:
        """The config of one part. Raises: ValueError from its checks."""
        return build(config_class, self.given, **more)

    @property
    def command(self) -> Command:
        """The command line as the run manifest records it."""
        return Command(self.program, self.argv, self.given)


_TABLES: Mapping[str, tuple[str, Mapping[str, Entry]]] = {
    "criterion": ("--criterion", CRITERIONS),
    "optimizer": ("--optimizer", OPTIMIZERS),
    "lr_scheduler": ("--lr-scheduler", LR_SCHEDULERS),
    "task": ("--task", TASKS),
}

_TRAINING = (
    RuntimeConfig,
    CommonConfig,
    DatasetConfig,
    BatchingConfig,
    ValidationConfig,
    DistributedConfig,
    OptimizationConfig,
    EmaConfig,
    CheckpointConfig,
)


def add_ignored(parser: FlagParser, table: Mapping[str, tuple[int, str]]) -> None:
    """Let a parser accept the flags of a table of ``ignored_flags``."""
    for name, (takes_value, _) in table.items():
        parser.add_ignored(name, takes_value=bool(takes_value))


def warn_ignored(parser: FlagParser, given: dict[str, Any], table: Mapping[str, tuple[int, str]]) -> None:
    """Log a line for each of them that was given, and forget it."""
    for name in parser.pop_ignored(given):
        logger.warning("%s is ignored: %s", name, table[name][1])


def _flags_of_others(chosen: Mapping[str, str]) -> dict[str, str]:
    """Flags that exist, but for another optimizer, schedule or criterion than the chosen one -> the reason."""
    reasons: dict[str, str] = {}
    for choice, (option, table) in _TABLES.items():
        for name, entry in table.items():
            if choice in chosen and name != chosen[choice]:
                for field in fields(entry.config):
                    for spelling in flag_names(field):
                        reasons.setdefault(spelling, f"belongs to {option} {name}, not to {chosen[choice]}")
    return reasons


def parse_train(argv: Sequence[str]) -> Settings:
    """Parse ``train.py``'s arguments. Exits with status 2 and one line on a mistake; plug-ins are imported first."""
    import_plugins("train.py", argv)
    first = FlagParser("train.py", "Train a model.")
    first.add_config(ChoicesConfig)
    chosen = _chosen(first.peek(argv))
    parser = FlagParser("train.py", "Train a model.")
    parser.add_config(ChoicesConfig)
    parser.add_config(PrintConfig)
    for config_class in (*_parts(chosen), *_TRAINING, model_config_class(model_name(chosen["arch"]))):
        parser.add_config(config_class)
    add_ignored(parser, ignored_flags.TRAIN)
    given = parser.parse(argv, ignored_flags.REJECTED_TRAIN | _flags_of_others(chosen))
    warn_ignored(parser, given, ignored_flags.TRAIN)
    return Settings("train.py", tuple(argv), given, chosen)


def training_configs(settings: Settings) -> TrainingConfigs:
    """Build every config of train.py. Raises: ValueError for an impossible value, before anything is loaded."""
    chosen = settings.chosen
    for config_class in _parts(chosen):
        settings.config(config_class)
    configs = TrainingConfigs(
        command=settings.command,
        chosen=chosen,
        options=settings.given,
        task=settings.config(TASKS[chosen["task"]].config),
        runtime=settings.config(RuntimeConfig),
        common=settings.config(CommonConfig),
        data=settings.config(DatasetConfig),
        batching=settings.config(BatchingConfig),
        validation=settings.config(ValidationConfig),
        distributed=settings.config(DistributedConfig),
        optimization=settings.config(OptimizationConfig),
        checkpoints=settings.config(CheckpointConfig),
        ema=settings.config(EmaConfig),
    )
    source = configs.checkpoints.finetune_from_model
    if source is None:
        build_model_config(chosen["arch"], settings.given)
    elif not os.path.isfile(source):  # otherwise it brings its own architecture
        raise ValueError(f"--finetune-from-model: no checkpoint at {source!r}")
    return configs


def evaluation_configs(settings: Settings) -> EvaluationConfigs:
    """Build every config of eval_lm.py or eval_lm-trime.py, and check the files that they name.

    Raises: ValueError for an impossible value or a missing file, before anything is loaded.
    """
    is_trime = settings.program == "eval_lm-trime.py"
    trime = settings.config(TrimeEvaluationConfig) if is_trime else None
    memory = MemoryEvaluationConfig() if is_trime else settings.config(MemoryEvaluationConfig)
    configs = EvaluationConfigs(
        command=settings.command,
        memory=memory,
        retomaton=RetomatonConfig() if is_trime else settings.config(RetomatonConfig),
        trime=trime,
        bulk=settings.config(BulkConfig),
        proof=settings.config(ProofConfig),
        decoder=settings.config(MemoryDecoderEvaluationConfig),
        knn=settings.config(KnnConfig),
        runtime=settings.config(RuntimeConfig),
        data=settings.config(DatasetConfig),
        evaluation=settings.config(EvaluationConfig),
        task_options={
            field.name: settings.given[field.name]
            for field in fields(GraphLanguageModelingConfig)
            if field.name in settings.given
        },
        key_tap=settings.given.get("knn_keytype"),
    )
    configs.require_files()
    return configs


def _parts(chosen: Mapping[str, str]) -> tuple[type, ...]:
    """The configs of the parts that were chosen by name."""
    return tuple(table[chosen[choice]].config for choice, (_, table) in _TABLES.items())


def _chosen(given: Mapping[str, Any]) -> dict[str, str]:
    choices = build(ChoicesConfig, given)
    chosen = {field.name: getattr(choices, field.name) for field in fields(choices)}
    for choice, (option, table) in _TABLES.items():
        lookup(table, chosen[choice], option)
    lookup(ARCHITECTURES, chosen["arch"], "--arch")
    return chosen | {"task": task_for(chosen["arch"], chosen["task"])}


def task_for(arch: str, task: str) -> str:
    """The task of a model: for a GNN-LM the same text, with its neighbours."""
    return GRAPH_TASK if task == "language_modeling" and model_name(arch) == GNN else task


def parse_eval_lm(argv: Sequence[str], program: str = "eval_lm.py", more: Sequence[type] = ()) -> Settings:
    """Parse the arguments of ``eval_lm.py`` or ``eval_lm-trime.py``. Exits with status 2 and one line on a mistake.

    Args:
        more: configs besides those of the program.
    """
    import_plugins(program, argv)
    parser = FlagParser(program, "Score text with a language model, with or without a memory.")
    parser.add_config(TaskChoiceConfig)
    task = parser.peek(argv).get("task", "language_modeling")
    trime = program == "eval_lm-trime.py"
    ours, others = ((TrimeEvaluationConfig,), (MemoryEvaluationConfig, RetomatonConfig))[:: 1 if trime else -1]
    for config_class in (
        lookup(TASKS, task, "--task").config,
        EvaluationConfig,
        *ours,
        BulkConfig,
        KnnConfig,
        MemoryDecoderEvaluationConfig,
        ProofConfig,
    ):
        parser.add_config(config_class)
    for config_class in (RuntimeConfig, CommonConfig, DatasetConfig):
        parser.add_config(config_class)
    for config_class in (_KeyTapConfig, *more):
        parser.add_config(config_class)
    if not trime:
        parser.add_config(GraphStoresConfig)
    add_ignored(parser, ignored_flags.EVALUATE)
    elsewhere = f"belongs to {'eval_lm.py' if trime else 'eval_lm-trime.py'}, not to {program}"
    reasons = {name: elsewhere for c in others for field in fields(c) for name in flag_names(field)}
    given = parser.parse(argv, ignored_flags.REJECTED_EVALUATE | reasons)
    warn_ignored(parser, given, ignored_flags.EVALUATE)
    return Settings(program, tuple(argv), with_default_batch(given), {"task": task})


@dataclass(frozen=True, kw_only=True)
class _KeyTapConfig:
    """Tap of the memory keys; overrides the checkpoint's."""

    knn_keytype: str | None = flag("--knn-keytype", default=None, parse=parse_tap)
    """Inner state that is the key: last_ffn_input, model_output, lm_output, separated_head or layer_N."""


def import_plugins(program: str, argv: Sequence[str]) -> None:
    """Import the --user-dir that the arguments name. Raises: ValueError naming what failed in it."""
    first = FlagParser(program, "")
    first.add_config(RuntimeConfig)
    user_dir = first.peek(argv).get("user_dir")
    if not user_dir:
        return
    try:
        import_user_dir(user_dir)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the plug-in's own code, which can fail in any way
        kind = type(error).__name__
        raise ValueError(
            f"--user-dir {user_dir} cannot be imported: {kind}: {error}; FAIRSEQ_TRACEBACK=1 shows where"
        ) from error


__getattr__, __dir__ = lazy(__name__)
