"""The one config of the pipeline: sections as frozen dataclasses, read from a YAML file and ``key=value`` words."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.config import LARGEST_COUNT, require_within
from fairseq.config.trees import build_tree, keyed, leaves
from fairseq.registry import lookup

STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
METRICS = ("exact_match", "bleu", "rouge")
EXACT = "exact"
"""``knn.index`` of a store that is searched without an index."""


def _within(low: float, high: float = LARGEST_COUNT, **values: float | None) -> None:
    """Raise ValueError for a value outside of the limits, named by its path; ``__`` stands for a dot."""
    for name, value in values.items():
        try:
            require_within(low, high, value=value)
        except ValueError as error:
            raise ValueError(str(error).replace("--value", name.replace("__", "."))) from None


def _one_of(path: str, name: str, names: Sequence[str]) -> None:
    lookup(dict.fromkeys(names, None), name, path)


@dataclass(frozen=True, kw_only=True)
class KnnSection:
    """The datastore: where it is, how it is made and how it is searched."""

    store_dir: str
    """Folder of the datastore, its index and its clusters."""
    store_size: int | None = None
    """Rows of the datastore, if you want them checked; the files know them."""
    temperature: float = 1.0
    """Divides the neighbours' scores before they become probabilities."""
    k: int = 64
    """Neighbours per token."""
    lmbda: float = keyed("lambda", 0.25)
    """Share of the neighbours in the probability, 0 to 1."""
    use_gpu: bool = False
    """Build the index on the first GPU."""
    enable_retomaton: bool = False
    """Cluster the keys, and evaluate with RetoMaton in place of kNN-LM."""
    index: str = "auto"
    """Kind of index: auto (ivfpq, of a small store flat), exact (none), or one of build_dstore.py --index."""
    probe: int = 32
    """Lists of the index that a search probes."""
    key_type: str = "last_ffn_input"
    """Where keys come from: last_ffn_input, last_ffn_output, final_hidden."""
    key_dtype: str = "float16"
    """Type of the keys on disk: float16, bfloat16, float32."""
    min_knns: int = 1
    """RetoMaton: active pointers needed to skip a search."""

    def __post_init__(self) -> None:
        _within(1, knn__store_size=self.store_size, knn__k=self.k, knn__probe=self.probe, knn__min_knns=self.min_knns)
        _within(0.0, 1.0, knn__lambda=self.lmbda)
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"knn.temperature must be above 0, got {self.temperature}")
        _one_of("knn.key_type", self.key_type, ("last_ffn_input", "last_ffn_output", "final_hidden"))
        _one_of("knn.key_dtype", self.key_dtype, ("float16", "bfloat16", "float32"))


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Pairs of texts, and how they become tokens."""

    train_path: str
    """.jsonl file of the pairs to train on and to save; one object a line."""
    val_path: str
    """.jsonl file of the pairs to evaluate on."""
    dataset_dir: str
    """Folder of the tokenised pairs, which generate.py writes."""
    train_batch_size: int = 16
    """Pairs of one forward call of training, over all devices together."""
    eval_batch_size: int = 16
    """Pairs of one forward call of saving and evaluation, per device."""
    input_key: str = "input"
    """Key of the input in each line."""
    output_key: str = "output"
    """Key of the output in each line."""
    input_template: str = "{input}"
    """What the model reads of an input, such as 'translate English to German: {input}'."""
    output_template: str = "{output}"
    """What the model is to write of an output; for a decoder with byte-level BPE often ' {output}'."""
    max_input_length: int = 256
    """Tokens of an input, at most."""
    max_output_length: int = 128
    """Tokens of an output, at most, its end included."""

    def __post_init__(self) -> None:
        _within(1, data__train_batch_size=self.train_batch_size, data__eval_batch_size=self.eval_batch_size)
        _within(1, data__max_input_length=self.max_input_length)
        _within(2, data__max_output_length=self.max_output_length)
        for name, template in (("input", self.input_template), ("output", self.output_template)):
            if f"{{{name}}}" not in template:
                raise ValueError(f"data.{name}_template: {template!r} lacks {{{name}}}, where the {name} is put")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model, encoder-decoder or decoder-only."""

    name: str
    """Folder or name of the model that training starts from, and of the tokenizer."""
    checkpoint: str | None = None
    """Folder of the fine-tuned model that saving and evaluation use; by default the last one of training.out_name."""
    enable_knn: bool = True
    """Evaluate with the datastore as well."""


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Fine-tuning."""

    out_name: str
    """Folder of the checkpoints."""
    num_epochs: int = 1
    """Passes over the pairs."""
    learning_rate: float = 1e-4
    """Highest rate; it falls to 0 in a line."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0."""
    gradient_accumulation_steps: int = 1
    """Batches of a step; each token of them weighs the same."""
    max_num_checkpoints: int = 2
    """Checkpoints kept, the latest ones."""
    eval_iters: int = 20
    """Batches of the validation pairs that a checkpoint is evaluated on; 0 for none."""
    save_interval: int = 500
    """Steps between checkpoints."""
    log_interval: int = 10
    """Steps between lines of the log."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this; 0 for no limit."""
    seed: int = 1
    """Seed of the order of pairs and of dropout."""

    def __post_init__(self) -> None:
        counts = ("num_epochs", "gradient_accumulation_steps", "max_num_checkpoints", "save_interval", "log_interval")
        _within(1, **{f"training.{name}": getattr(self, name) for name in counts})
        rest = ("warmup_steps", "eval_iters", "seed", "weight_decay", "max_grad_norm", "learning_rate")
        _within(0, **{f"training.{name}": getattr(self, name) for name in rest})


@dataclass(frozen=True, kw_only=True)
class ZeroSection:
    """DeepSpeed's ZeRO."""

    stage: int = 2
    """What is divided among devices: 1 the optimizer's state, 2 gradients too, 3 weights too."""

    def __post_init__(self) -> None:
        _within(1, 3, deepspeed__zero_optimization__stage=self.stage)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSection:
    """Settings of the strategy deepspeed."""

    zero_optimization: ZeroSection = ZeroSection()


@dataclass(frozen=True, kw_only=True)
class FabricSection:
    """Devices, through Lightning Fabric; under torchrun its numbers count."""

    strategy: str = "auto"
    """auto (ddp where there are several devices), ddp, fsdp, deepspeed, or deepspeed_stage_1 to 3."""
    devices: int = 1
    """Processes per node, each with a device of its own."""
    num_nodes: int = 1
    """Machines."""
    accelerator: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "32-true"
    """32-true, bf16-mixed or bf16-true."""

    def __post_init__(self) -> None:
        _one_of("fabric.strategy", self.strategy, STRATEGIES)
        _one_of("fabric.accelerator", self.accelerator, ("auto", "cpu", "cuda"))
        _one_of("fabric.precision", self.precision, PRECISIONS)
        _within(1, fabric__devices=self.devices, fabric__num_nodes=self.num_nodes)


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is computed of the validation pairs, beside perplexity."""

    out_dir: str
    """Folder of the figures and of a line for each pair."""
    metrics: tuple[str, ...] = METRICS
    """Scores of the texts that the model writes; [] writes none, which saves most of the time."""
    num_beams: int = 1
    """Beams of the search."""
    max_examples: int | None = None
    """Pairs, at most."""

    def __post_init__(self) -> None:
        for name in self.metrics:
            _one_of("evaluation.metrics", name, METRICS)
        _within(1, evaluation__num_beams=self.num_beams, evaluation__max_examples=self.max_examples)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """All sections."""

    knn: KnnSection
    data: DataSection
    model: ModelSection
    training: TrainingSection
    evaluation: EvaluationSection
    fabric: FabricSection = FabricSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    folder: str = "."
    """Folder for the other paths of a file to begin with: ${folder}/store."""

    def __post_init__(self) -> None:
        named = self.fabric.strategy.removeprefix("deepspeed_stage_")
        stage = self.deepspeed.zero_optimization.stage
        if named.isdecimal() and int(named) != stage:
            raise ValueError(
                f"fabric.strategy is {self.fabric.strategy} and deepspeed.zero_optimization.stage is {stage}; "
                "set the strategy to deepspeed, which takes the stage from there"
            )


def read_config(words: Sequence[str], default: Path) -> PipelineConfig:
    """Read ``[--config FILE] [key=value ...]``; without a file the default one. ``--help`` lists the keys and exits.

    Raises: ValueError for anything else, and as ``build_tree``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file, pairs, waiting = default, [], list(words)
    while waiting:
        word = waiting.pop(0)
        if word in ("-h", "--help"):
            lines = (f"  {path:<40} {text}\n" for path, text in leaves(PipelineConfig))
            sys.stdout.write(f"[--config FILE] [key=value ...]   (default: {default})\n\n{''.join(lines)}")
            sys.exit(0)
        option, equals, name = word.partition("=")
        if option == "--config":
            if not equals and not waiting:
                raise ValueError("--config needs a file")
            file = Path(name if equals else waiting.pop(0))
        elif equals and option.strip(".") and not word.startswith("-"):
            pairs.append(word)
        else:
            raise ValueError(f"{word!r} is neither --config FILE nor key=value, such as knn.k=32")
    if not file.is_file():
        raise ValueError(f"--config: no such file: {file}")
    where = str(file)
    try:
        merged: Any = OmegaConf.load(file)
        if not OmegaConf.is_dict(merged):
            raise ValueError("it holds no sections, such as knn: and data:")
        for where in pairs:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([where]))
        where = str(file)
        tree: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    return build_tree(PipelineConfig, tree)
