"""``fairseq.options`` of scripts: parsers of the commands, to which a script adds its own options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from fairseq import options
from fairseq.config import FlagParser, Namespace, flag
from fairseq.data.batching_config import DatasetConfig
from fairseq.evaluation.config import BulkConfig, EvaluationConfig, MemoryEvaluationConfig
from fairseq.generation.config import GenerationConfig
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.memory.sources.config import KnnConfig
from fairseq.models.architectures import build_model_config
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.tasks import TASKS

_EVALUATION = (
    EvaluationConfig,
    MemoryEvaluationConfig,
    RetomatonConfig,
    BulkConfig,
    KnnConfig,
    RuntimeConfig,
    CommonConfig,
    DatasetConfig,
)


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The model of a script that generates text."""

    path: str | None = flag("--path", default=None)
    """Checkpoints, separated by colons."""


class ScriptParser(FlagParser):
    """Reads a command's flags and those that a script has added by ``add_argument``, as one ``args``."""

    def __init__(self, program: str, read: Callable[[list[str]], dict[str, Any]]) -> None:
        super().__init__(program, "")
        self._read = read

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """All settings, defaults included. Exits with status 2 and one line on a mistake."""
        own, rest = self.parse_known_args(list(sys.argv[1:] if argv is None else argv))
        return Namespace(**(self._read(rest) | vars(own)))


def _defaults(*configs: type) -> dict[str, Any]:
    found = {field.name: field.default for config in configs for field in fields(config)}
    return {name: None if value is MISSING else value for name, value in found.items()}


def _train(words: list[str]) -> dict[str, Any]:
    settings = options.parse_train(words)
    parts = (*options._parts(settings.chosen), *options._TRAINING)
    model = asdict(build_model_config(settings.chosen["arch"], settings.given))
    return model | _defaults(*parts) | dict(settings.given) | dict(settings.chosen)


def _evaluate(words: list[str]) -> dict[str, Any]:
    settings = options.parse_eval_lm(words)
    return _defaults(TASKS[settings.chosen["task"]].config, *_EVALUATION) | dict(settings.given) | dict(settings.chosen)


def _generate(words: list[str]) -> dict[str, Any]:
    parser = FlagParser("generate", "Generate text.")
    configs = (TASKS["language_modeling"].config, PathConfig, GenerationConfig, RuntimeConfig, CommonConfig)
    for config in (options.TaskChoiceConfig, *configs):
        parser.add_config(config)
    return _defaults(options.TaskChoiceConfig, *configs) | parser.parse(words)


def get_training_parser(default_task: str = "language_modeling") -> ScriptParser:
    """Parser of train.py's flags."""
    return ScriptParser("train.py", lambda words: _train(_with_task(words, default_task)))


def get_eval_lm_parser(default_task: str = "language_modeling") -> ScriptParser:
    """Parser of eval_lm.py's flags."""
    return ScriptParser("eval_lm.py", lambda words: _evaluate(_with_task(words, default_task)))


def get_generation_parser(interactive: bool = False, default_task: str = "language_modeling") -> ScriptParser:
    """Parser of the settings with which ``from_pretrained(...).sample`` generates text."""
    return ScriptParser("generate", _generate)


def _with_task(words: list[str], task: str) -> list[str]:
    """The words, with fairseq's own default for --task where it is another one than ours."""
    given = any(word.partition("=")[0] == "--task" for word in words)
    return words if given or task in ("language_modeling", "translation") else [*words, "--task", task]


def parse_args_and_arch(
    parser: ScriptParser,
    input_args: Sequence[str] | None = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: Callable[[ScriptParser], None] | None = None,
) -> Any:
    """The settings of a command line, those of the named architecture included.

    Raises: ValueError for ``parse_known`` or ``suppress_defaults``. Exits with status 2 on a mistake.
    """
    if parse_known or suppress_defaults:
        raise ValueError("parse_known and suppress_defaults are not offered; add the script's options to the parser")
    if modify_parser is not None:
        modify_parser(parser)
    found: Mapping[str, Any] = vars(parser.parse_args(input_args))
    return Namespace(**found)
