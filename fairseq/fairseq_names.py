"""Python names of fairseq that mean the same here, and what to use instead of those that do not.

Strings only: a name is imported when it is used. ``fairseq.moved`` finds the modules, and each package hands its
names on with :func:`lazy`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Module of fairseq -> the module that serves it. Those that exist under their own name are not listed.
MODULES = {
    "fairseq.criterions.fairseq_criterion": "fairseq.compat.criterion",
    "fairseq.data.data_utils": "fairseq.compat.data_utils",
    "fairseq.data.fairseq_dataset": "fairseq.compat.datasets",
    "fairseq.dataclass": "fairseq.compat.flags",
    "fairseq.dataclass.utils": "fairseq.compat.flags",
    "fairseq.distributed": "fairseq.compat.distributed",
    "fairseq.distributed.utils": "fairseq.compat.distributed",
    "fairseq.distributed_utils": "fairseq.compat.distributed",
    "fairseq.hub_utils": "fairseq.compat.hub",
    "fairseq.logging": "fairseq.compat.logging",
    "fairseq.logging.meters": "fairseq.compat.logging.meters",
    "fairseq.logging.metrics": "fairseq.compat.logging.metrics",
    "fairseq.logging.progress_bar": "fairseq.compat.logging.progress_bar",
    "fairseq.meters": "fairseq.compat.logging.meters",
    "fairseq.models.fairseq_model": "fairseq.compat.models",
    "fairseq.optim.fairseq_optimizer": "fairseq.compat.optim",
    "fairseq.optim.lr_scheduler": "fairseq.compat.optim",
    "fairseq.optim.lr_scheduler.fairseq_lr_scheduler": "fairseq.compat.optim",
    "fairseq.sequence_generator": "fairseq.generation.sequence_generator",
    "fairseq.progress_bar": "fairseq.compat.logging.progress_bar",
    "fairseq.tokenizer": "fairseq.compat.utils",
    "fairseq.utils": "fairseq.compat.utils",
}

# Package -> name -> module that defines it.
NAMES: dict[str, dict[str, str]] = {
    "fairseq.checkpoint_utils": {
        "load_checkpoint_to_cpu": "fairseq.compat.checkpoints",
        "load_model_ensemble": "fairseq.compat.checkpoints",
        "load_model_ensemble_and_task": "fairseq.compat.checkpoints",
    },
    "fairseq.criterions": {
        "FairseqCriterion": "fairseq.compat.criterion",
        "LegacyFairseqCriterion": "fairseq.compat.criterion",
    },
    "fairseq.criterions.label_smoothed_cross_entropy": {"label_smoothed_nll_loss": "fairseq.compat.criterion"},
    "fairseq.data": {
        "BaseWrapperDataset": "fairseq.compat.datasets",
        "Dictionary": "fairseq.data.dictionary",
        "EpochBatchIterator": "fairseq.data.iterators",
        "FairseqDataset": "fairseq.compat.datasets",
        "LMContextWindowDataset": "fairseq.compat.datasets",
        "LanguagePairDataset": "fairseq.data.language_pair_dataset",
        "MMapIndexedDataset": "fairseq.data.indexed_dataset",
        "MonolingualDataset": "fairseq.compat.datasets",
        "TokenBlockDataset": "fairseq.compat.datasets",
    },
    "fairseq.metrics": {
        name: "fairseq.compat.logging.metrics"
        for name in (
            "aggregate get_meter get_smoothed_value get_smoothed_values log_derived log_scalar log_start_time "
            "log_stop_time reset reset_meters"
        ).split()
    },
    "fairseq.models": {
        "ARCH_MODEL_REGISTRY": "fairseq.compat.models",
        "BaseFairseqModel": "fairseq.compat.models",
        "FairseqLanguageModel": "fairseq.compat.models",
        "register_model": "fairseq.compat.models",
        "register_model_architecture": "fairseq.models.architectures",
    },
    "fairseq.models.transformer": {
        "TransformerDecoder": "fairseq.models.transformer_decoder",
        "TransformerEncoder": "fairseq.models.transformer_encoder",
    },
    "fairseq.models.transformer_lm": {
        name: "fairseq.compat.models"
        for name in (
            "base_lm_architecture transformer_lm_big transformer_lm_baevski_wiki103 transformer_lm_baevski_gbw "
            "transformer_lm_gpt"
        ).split()
    },
    "fairseq.modules": {
        "LayerNorm": "fairseq.compat.models",
        "SinusoidalPositionalEmbedding": "fairseq.modules.positional_embedding",
        "LearnedPositionalEmbedding": "fairseq.modules.positional_embedding",
        "gelu": "fairseq.compat.models",
    },
    "fairseq.optim": {
        "FairseqOptimizer": "fairseq.compat.optim",
        "LegacyFairseqOptimizer": "fairseq.compat.optim",
    },
    "fairseq.options": {
        name: "fairseq.compat.parsers"
        for name in ("get_eval_lm_parser get_generation_parser get_training_parser parse_args_and_arch").split()
    },
    "fairseq.tasks": {
        "FairseqTask": "fairseq.tasks.fairseq_task",
        "LegacyFairseqTask": "fairseq.tasks.fairseq_task",
        "setup_task": "fairseq.compat.tasks",
    },
}

_SEARCH = "is not offered: datastores are searched by fairseq.memory.ExternalMemory"
_TEXT = "is not offered: fairseq.generation.sequence_generator generates text from left to right"
_PAIRS = "is not offered: derive from fairseq.models.transformer.TransformerModel, the model with an encoder"
_LAYER = "has another signature here: see the modules of fairseq/modules"

# Name of fairseq -> why there is none, and what to use instead.
ELSEWHERE = {
    "fairseq.data.IndexedCachedDataset": "is not offered: fairseq.data.MMapIndexedDataset reads its files too",
    "fairseq.data.data_utils.infer_language_pair": "is not offered: fairseq.tasks.translation.TranslationTask finds it",
    "fairseq.data.indexed_dataset.make_dataset": "is not offered: fairseq.data.data_utils.load_indexed_dataset opens "
    "binarised text",
    "fairseq.file_io": "is not offered: open() and os.path read and write files",
    "fairseq.iterative_refinement_generator": _TEXT,
    "fairseq.knnlm": _SEARCH,
    "fairseq.model_parallel": "is not offered: a model runs on one device per process",
    "fairseq.models.FairseqDecoder": "is not offered: derive from fairseq.models.transformer_lm.TransformerDecoder",
    "fairseq.models.FairseqEncoder": _PAIRS,
    "fairseq.models.FairseqEncoderDecoderModel": _PAIRS,
    "fairseq.models.FairseqIncrementalDecoder": "is not offered: derive from "
    "fairseq.models.transformer_lm.TransformerDecoder, whose forward takes incremental_state",
    "fairseq.modules.AdaptiveInput": _LAYER,
    "fairseq.modules.AdaptiveSoftmax": _LAYER,
    "fairseq.modules.FairseqDropout": "is not offered: torch.nn.Dropout computes the same",
    "fairseq.modules.MultiheadAttention": _LAYER,
    "fairseq.modules.PositionalEmbedding": _LAYER,
    "fairseq.modules.TransformerDecoderLayer": _LAYER,
    "fairseq.modules.TransformerEncoderLayer": _LAYER,
    "fairseq.modules.quant_noise": "is not offered: models are trained in float32, float16 or bfloat16",
    "fairseq.optim.FP16Optimizer": "is not offered: --fp16 is PyTorch's mixed precision",
    "fairseq.options.get_parser": "is not offered: get_training_parser or get_eval_lm_parser make a command's",
    "fairseq.options.get_preprocessing_parser": "is not offered: fairseq_cli.preprocess.parse reads its flags",
    "fairseq.search": _TEXT,
    "fairseq.pdb": "is not offered: breakpoint() opens Python's own debugger",
}


def sentence(name: str) -> str | None:
    """One sentence about a dotted name that is not offered, or about the module that it is in; None for any other."""
    known = name
    while known and known not in ELSEWHERE:
        known = known.rpartition(".")[0]
    return f"{known} {ELSEWHERE[known]}" if known else None


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for the names of fairseq in a package.

    The former raises AttributeError: with what to use instead where that is known.
    """
    table = NAMES.get(package, {})

    def load(name: str) -> Any:
        if name in table:
            return getattr(importlib.import_module(table[name]), name)
        raise AttributeError(sentence(f"{package}.{name}") or f"module {package!r} has no attribute {name!r}")

    return load, lambda: sorted(table)
