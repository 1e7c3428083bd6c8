"""The table of fairseq's flags in docs/compatibility.md: ``python tests/helpers/flags_table.py`` writes it.

tests/fixtures/fairseq_flags.json lists the flags of fairseq 0.9's fork TRIME and of fairseq 0.12 by command.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

from fairseq import options
from fairseq.config import flag_names, ignored_flags
from fairseq.criterions import CRITERIONS
from fairseq.data.codecs import CodecConfig
from fairseq.evaluation import config as evaluation
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.models.config import TransformerConfig, TransformerLMConfig
from fairseq.optim import LR_SCHEDULERS, OPTIMIZERS
from fairseq.tasks import TASKS
from fairseq_cli import generate, preprocess

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compatibility.md"
START, END = "<!-- Written by tests/helpers/flags_table.py. -->\n", "<!-- End of the table. -->\n"

# Flags that mean something near to what they mean in fairseq.
MAPPED = {
    "train": {
        "--memory-efficient-fp16": "as --fp16",
        "--memory-efficient-bf16": "as --bf16",
        "--nprocs-per-node": "as --distributed-world-size",
        "--min-lr": "floor or end of training, see above",
        "--max-valid-steps": "N batches; fairseq reads one more",
        "--nval": "as --max-valid-steps",
        "--ignore-unused-valid-subsets": "silences a warning; an error in fairseq",
        "--num-workers": "threads; processes in fairseq",
        "--save-interval-updates": "saves at an epoch's end as well",
    },
    "evaluate": {
        "--memory-efficient-fp16": "as --fp16",
        "--tokens-per-sample": "by kind of checkpoint, see above",
        "--num-workers": "threads; processes in fairseq",
        "--dstore-size": "checked against the store",
    },
    "preprocess": {"--dataset-impl": "always written as mmap"},
    "generate": {
        "--memory-efficient-fp16": "as --fp16",
        "--memory-efficient-bf16": "as --bf16",
        "--num-workers": "threads; processes in fairseq",
        "--max-len-a": "of each source; fairseq takes the longest of the batch",
    },
}
# Flags that exist to be rejected with a reason of their own.
REJECTED_BY_CONFIG = {
    "train": {"--character-embeddings": "is not offered; use word embeddings, or --adaptive-input"},
}
_TABLES = (TASKS, CRITERIONS, OPTIMIZERS, LR_SCHEDULERS)
CONFIGS: dict[str, tuple[type, ...]] = {
    "train": (
        options.ChoicesConfig,
        TransformerLMConfig,
        TransformerConfig,
        *options._TRAINING,
        *(entry.config for table in _TABLES for name, entry in table.items()),
    ),
    "evaluate": (
        options.TaskChoiceConfig,
        *(entry.config for entry in TASKS.values()),
        *(evaluation.EvaluationConfig, evaluation.MemoryEvaluationConfig, evaluation.TrimeEvaluationConfig),
        *(RetomatonConfig, evaluation.BulkConfig, options.KnnConfig, options._KeyTapConfig),
        *(options.RuntimeConfig, options.CommonConfig, options.DatasetConfig),
    ),
    "preprocess": (preprocess.PreprocessConfig,),
    "generate": (*generate.CONFIGS, CodecConfig, options.TaskChoiceConfig, TASKS["translation"].config),
}
IGNORED = {
    "train": ignored_flags.TRAIN,
    "evaluate": ignored_flags.EVALUATE,
    "preprocess": preprocess.IGNORED,
    "generate": ignored_flags.GENERATE,
}
REJECTED = {
    "train": ignored_flags.REJECTED_TRAIN,
    "evaluate": ignored_flags.REJECTED_EVALUATE,
    "preprocess": ignored_flags.REJECTED_PREPROCESS,
    "generate": ignored_flags.REJECTED_GENERATE,
}
PROGRAMS = {
    "train": "train.py",
    "evaluate": "eval_lm.py, eval_lm-trime.py",
    "preprocess": "preprocess.py",
    "generate": "generate.py",
}


def reference_flags() -> dict[str, list[str]]:
    """Flags of the originals by command, dashes for underscores."""
    found: dict[str, list[str]] = json.loads((ROOT / "tests/fixtures/fairseq_flags.json").read_text())
    return found


def known_flags(command: str) -> set[str]:
    """Spellings that a command's configs take."""
    names = (name for config in CONFIGS[command] for field in fields(config) for name in flag_names(field))
    return {name.replace("_", "-") for name in names}


def classify(command: str, name: str) -> tuple[str, str]:
    """(same, mapped, ignored or rejected; why), or ("", "") for a flag that is none of them."""
    rejected = REJECTED_BY_CONFIG.get(command, {}) | REJECTED.get(command, {})
    if name in rejected:
        return "rejected", rejected[name]
    if name in known_flags(command):
        mapped = MAPPED[command].get(name)
        return ("mapped", mapped) if mapped else ("same", "")
    return ("ignored", IGNORED[command][name][1]) if name in IGNORED[command] else ("", "")


def section() -> str:
    """The table as Markdown."""
    lines = [START, "| command | | flags |\n", "|---|---|---|\n"]
    for command, program in PROGRAMS.items():
        kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in reference_flags()[command]:
            kind, why = classify(command, name)
            kinds[kind][why].append(f"`{name}`")
        for kind in ("same", "mapped", "ignored", "rejected"):
            rows = [" ".join(names) + (f" ({why})" if why else "") for why, names in kinds[kind].items()]
            if rows:
                lines.append(f"| {program} | {kind} | {'; '.join(rows)} |\n")
    return "".join([*lines, END])


def main() -> None:
    """Write the table into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + section() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
