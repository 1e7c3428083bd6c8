"""Checkpoints: one file of plain types and tensors, written whole or not at all, read without running code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import IO, Any, cast

import torch
from torch import Tensor

from fairseq.checkpoints.integrity import require_intact
from fairseq.checkpoints.legacy import from_fairseq, read_pickle
from fairseq.checkpoints.parts import join_parts
from fairseq.data.dictionary import Dictionary
from fairseq.fairseq_names import lazy
from fairseq.models.architectures import model_class, model_config_class
from fairseq.models.config import TransformerLMConfig, flag_of, model_config_from
from fairseq.models.legacy_names import upgrade_state_dict
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import did_you_mean
from fairseq.runtime.atomic_files import writing

logger = logging.getLogger(__name__)

_OTHER_SETTINGS = "the checkpoint's settings (or --model-overrides) describe another architecture than its weights"
_OF_TEXT = ("language_modeling", "graph_language_modeling")
_FORMAT = "fairseq-memory checkpoint"
_VERSION = 1
_VERSION_IN_PARTS = 2

# Settings that fairseq's commands override although no model here reads them.
_NOT_OF_THE_MODEL = re.compile(
    r"data|tokens_per_sample|sample_break_mode|add_bos_token|context_window|criterion|task|arch|seed|cpu|fp16"
    r"|max_tokens|max_sentences|knnlm|k|lmbda|probe|indexfile|dstore_\w+|faiss_\w+|knn_sim_func|no_load_keys"
    r"|move_dstore_to_mem"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model and, in the middle of training, everything needed to resume."""

    config: dict[str, dict[str, Any]]
    """Settings by group: at least ``task`` and ``model``."""
    model: dict[str, Tensor]
    """Weights by name."""
    optimizer: dict[str, Any] | None = None
    """State of the optimizer."""
    scheduler: dict[str, Any] | None = None
    """State of the learning rate schedule."""
    iterator: dict[str, Any] | None = None
    """Place in the data."""
    progress: dict[str, Any] | None = None
    """Counts and figures of the run."""

    @property
    def written_by(self) -> str:
        """The program that wrote it: FAIRSEQ_0_9 (its forks too), FAIRSEQ_0_12, or the empty string for this one."""
        return str(self.config.get("written_by", {}).get("program", ""))


def save_checkpoint(path: str, checkpoint: Checkpoint, parts: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint: under another name first, to disk, then renamed, so that ``path`` is always whole.

    Args:
        parts: of a checkpoint in parts, what ``fairseq.checkpoints.parts.index_entry`` says of them.
    Raises: OSError naming ``path`` when it cannot be written (the file before stays); TypeError for a value that is
        neither a plain type nor a tensor.
    """
    content: dict[str, Any] = {"format": _FORMAT, "version": _VERSION_IN_PARTS if parts else _VERSION, **(parts or {})}
    for field in fields(checkpoint):
        content[field.name] = _plain(getattr(checkpoint, field.name), field.name)
    try:
        with writing(path, binary=True) as file:
            _write(content, _Recorder(file))
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)} (the checkpoint was not saved)", path) from error
    _sync_folder(os.path.dirname(path) or ".")


class _Recorder:
    """A file that remembers why a write failed: PyTorch's writer reports any failure as a RuntimeError."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, remembering a failure."""
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Pass on what was written."""
        self.file.flush()


def _write(content: object, recorder: _Recorder) -> None:
    try:
        torch.save(content, cast("IO[bytes]", recorder))
    except Exception as error:
        if recorder.error is not None:
            raise recorder.error from error
        raise


def _sync_folder(path: str) -> None:
    """Make a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _plain(value: object, where: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"a checkpoint holds plain types and tensors; {where} is a {type(value).__name__}")


def load_checkpoint(path: str, *, whole: bool = False) -> Checkpoint:
    """Read a checkpoint of this package, or of fairseq, knnlm or TRIME.

    Args:
        whole: compare the optimizer's state with its checksums too, not only the weights; to resume from it.

    Raises: OSError when it cannot be opened; ValueError when it is damaged, or no checkpoint.
    """
    content = read_pickle(path)
    require_intact(path, content, whole=whole)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return Checkpoint(**from_fairseq(content, path))
    if content["version"] not in (_VERSION, _VERSION_IN_PARTS):
        raise ValueError(
            f"{path} has format version {content['version']}, this program reads {_VERSION} and {_VERSION_IN_PARTS}; "
            "update it"
        )
    content = join_parts(path, content, whole=whole)
    missing = [field.name for field in fields(Checkpoint) if field.name not in content]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}; copy it again, or take an older one")
    config = content["config"]
    if not isinstance(config, dict) or not all(isinstance(group, dict) for group in config.values()):
        raise ValueError(f"{path} is damaged: its settings are no groups of settings; copy it again")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def load_model(
    checkpoint: Checkpoint,
    dictionary_size: int,
    pad: int,
    overrides: Mapping[str, Any] | None = None,
    source_size: int | None = None,
    extended_to: str | None = None,
) -> TransformerLanguageModel:
    """Make the model of a checkpoint, in float32 on the CPU, in training mode.

    Args:
        source_size: types of the source's dictionary, for a translation model.
        overrides: settings of the model that replace the checkpoint's (``--model-overrides``).
        extended_to: name of a model that has the checkpoint's in it, and parts of its own, which are drawn; other
            names change nothing.
    Raises: ValueError when the dictionary has another size, an override is unknown, or the weights do not fit.
    """
    task, arch = (checkpoint.config.get(group, {}).get(name) for group, name in (("task", "name"), ("model", "arch")))
    wanted, named = (_OF_TEXT, "language") if source_size is None else (("translation",), "translation")
    if task not in wanted or "decoder.embed_tokens" not in " ".join(checkpoint.model):
        raise ValueError(f"the checkpoint holds no transformer {named} model, but {arch!r} for task {task!r}; give one")
    _require_size(checkpoint, "decoder", dictionary_size, "" if source_size is None else " target")
    if source_size is not None:
        _require_size(checkpoint, "encoder", source_size, " source")
    name = str(checkpoint.config["model"].get("kind", "transformer_lm" if source_size is None else "transformer"))
    kind = model_class(name)
    extends = extended_to not in (None, name) and model_class(str(extended_to)).extends is kind
    kind, name = (model_class(str(extended_to)), str(extended_to)) if extends else (kind, name)
    saved, known = checkpoint.config["model"], _known_overrides(overrides or {}, model_config_class(name))
    settings = saved | known
    config = model_config_from(settings, model_config_class(name))
    sizes = {} if source_size is None else {"source_size": source_size}
    make = kind.build if extends else kind.unfilled
    model: TransformerLanguageModel = make(config, dictionary_size, pad, **sizes)
    own = model.state_dict()
    weights = keep_layers(upgrade_state_dict(checkpoint.model, own), config)
    own = {name: value for name, value in own.items() if not (extends and model.is_own(name))}
    _require_fit(own, weights, _OTHER_SETTINGS if extended_to is None else _other_flags(saved, known))
    model.load_state_dict(weights)
    return model


def load_model_for(
    dictionary: Dictionary,
    checkpoint: Checkpoint,
    path: str,
    overrides: Mapping[str, Any] | None = None,
    source: Dictionary | None = None,
    extended_to: str | None = None,
) -> TransformerLanguageModel:
    """As load_model, for a task's dictionaries.

    Args:
        dictionary: of what the model predicts.
        source: of what a translation model reads.
        extended_to: as there.
    Raises: ValueError naming the file when a dictionary differs.
    """
    try:
        size = None if source is None else len(source)
        model = load_model(checkpoint, len(dictionary), dictionary.pad(), overrides, size, extended_to)
        _require_dictionary(checkpoint, dictionary, "dictionary_digest")
        if source is not None:
            _require_dictionary(checkpoint, source, "source_dictionary_digest")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def _require_size(checkpoint: Checkpoint, side: str, size: int, which: str) -> None:
    """Raise ValueError when a model was trained with a dictionary of another size."""
    found = vocabulary_size(checkpoint.model, side)
    if found != size:
        raise ValueError(
            f"the checkpoint was trained with a dictionary of {found} types, the data's{which} has {size}; "
            "use the data folder it was trained on, or binarise the text with its dict.txt (--srcdict)"
        )


def _require_dictionary(checkpoint: Checkpoint, dictionary: Dictionary, entry: str) -> None:
    """Raise ValueError when a model was trained with another dictionary of the same size, where that is recorded."""
    saved, digest = checkpoint.config.get("task", {}).get(entry), dictionary.digest()
    if saved not in (None, digest):
        which = "source " if entry.startswith("source") else ""
        raise ValueError(
            f"the checkpoint was trained with another {which}dictionary than the data's dict.txt (digest "
            f"{saved[:12]}, not {digest[:12]}); use the data folder it was trained on, or binarise the text with its "
            "dict.txt (--srcdict)"
        )


def vocabulary_size(weights: Mapping[str, Tensor], side: str = "decoder") -> int:
    """Number of types that one side of a model's weights are for."""
    bands = re.compile(rf"{side}\.embed_tokens\.(weight|embeddings\.\d+\.0\.weight)")
    return sum(len(value) for name, value in weights.items() if bands.fullmatch(name))


def _known_overrides(overrides: Mapping[str, Any], config: type[TransformerLMConfig]) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    for name in overrides:
        if _NOT_OF_THE_MODEL.fullmatch(name):
            logger.warning("--model-overrides: %s is no setting of the model and is ignored", name)
        elif name not in known:
            raise ValueError(f"--model-overrides: the model has no setting {name!r}{did_you_mean(name, known)}")
    return {name: value for name, value in overrides.items() if name in known}


def keep_layers(weights: Mapping[str, Tensor], config: TransformerLMConfig) -> dict[str, Tensor]:
    """Drop and renumber layers as ``--decoder-layers-to-keep`` and its like say, unless the file holds just those.

    Raises: ValueError when the file has no layer of that number.
    """
    weights = dict(weights)
    for side in ("encoder", "decoder"):
        weights = _keep_layers(weights, side, getattr(config, f"{side}_layers_to_keep", None))
    return weights


def _keep_layers(weights: dict[str, Tensor], side: str, keep: tuple[int, ...] | None) -> dict[str, Tensor]:
    layer = re.compile(rf"{side}\.layers\.(\d+)(\..*)")
    numbers = {int(hit.group(1)) for hit in map(layer.match, weights) if hit}
    if not keep or len(numbers) == len(keep):
        return weights
    if not numbers.issuperset(keep):
        raise ValueError(
            f"--{side}-layers-to-keep {','.join(map(str, keep))}: the checkpoint has layers 0 to {max(numbers)}"
        )
    place = {old: new for new, old in enumerate(sorted(keep))}
    kept = {}
    for name, value in weights.items():
        hit = layer.match(name)
        if hit is None:
            kept[name] = value
        elif int(hit.group(1)) in place:
            kept[f"{side}.layers.{place[int(hit.group(1))]}{hit.group(2)}"] = value
    return kept


def _other_flags(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Which flags of training ask for another architecture than a checkpoint has, as a clause with the way out."""
    shapes = {
        name: value
        for name, value in asked.items()
        if name in saved and (isinstance(value, (int, tuple)) or name == "graph_mean")
    }
    changed = [name for name, value in shapes.items() if _as_list(saved[name]) != _as_list(value)]
    wanted = ", ".join(f"{flag_of(name)} {asked[name]} (the checkpoint has {saved[name]})" for name in changed)
    return (
        f"--finetune-from-model keeps the architecture of its checkpoint, and the run asks for {wanted or 'another'}; "
        "give what it has, or start from one without such weights, such as the language model of a GNN-LM"
    )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _require_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], way_out: str) -> None:
    """Raise ValueError for the first weight that the model lacks, the file lacks, or that has another shape.

    Args:
        way_out: a clause of the message.
    """
    for name, value in own.items():
        if name not in weights:
            raise ValueError(f"the model has a weight {name} {tuple(value.shape)}, the checkpoint has none; {way_out}")
        if weights[name].shape != value.shape:
            raise ValueError(
                f"weight {name} has shape {tuple(weights[name].shape)} in the checkpoint "
                f"and {tuple(value.shape)} in the model; {way_out}"
            )
    for name, value in weights.items():
        if name not in own:
            raise ValueError(f"the checkpoint has a weight {name} {tuple(value.shape)}, the model has none; {way_out}")


__getattr__, __dir__ = lazy(__name__)
