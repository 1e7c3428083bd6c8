"""Checkpoints of fairseq 0.6 to 0.12, knnlm and TRIME: pickles, read as plain types and tensors without executing them.

PyTorch's restricted unpickler reads them. Besides tensors and plain types it is only ever shown stand-ins that keep
what they are given and do nothing: for ``argparse.Namespace`` and for classes of the programs that wrote such files.
Everything else that a pickle asks for is rejected, so reading a file never runs code from it.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import IO, Any

import torch

from fairseq.checkpoints.gnn_lm import graph_settings, holds_graph, renamed
from fairseq.checkpoints.integrity import has_checksums
from fairseq.models.config import TransformerConfig, TransformerLMConfig

# Modules whose classes may appear in a checkpoint's settings; they are never imported.
_FOREIGN = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|hydra|numpy|typing|pathlib)\.[\w.]+|_codecs\.encode|enum\.\w+"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|set|str|tuple)|collections\.defaultdict"
)
_USUAL = re.compile(
    r"torch\.(\w+Storage|storage\.\w+|_utils\._rebuild_\w+|Size|device|dtype|[a-z]+\d+|nn\.parameter\.Parameter)"
    r"|collections\.(OrderedDict|Counter)"
)
# torch.save writes names as Python 2 knew them.
_PYTHON_2_NAMES = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}
_PICKLES_OF_OLD_FORMAT = 5  # magic number, version, system, content, storage keys; raw storages follow

# Kinds of checkpoints whose users expect different things of one flag.
FAIRSEQ_0_9, FAIRSEQ_0_12 = "fairseq 0.9", "fairseq 0.12"
# Settings of fairseq 0.12 that change what a model computes and that this package has not.
_UNSUPPORTED = (
    "base_layers",
    "scale_fc",
    "scale_attn",
    "scale_heads",
    "scale_resids",
    "decoder_xformers_att_config",
    "no_cross_attention",
    "cross_self_attention",
)
# What wrappers of a whole module put before a weight's name: data-parallel ones, compilation, sharding, checkpointing.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.)+"
)
_TASK_FIELDS = ("data", "sample_break_mode", "tokens_per_sample", "max_target_positions", "add_bos_token")
_GRAPH_FIELDS = ("neighbor_context", "gcn_k", "gcn_context_window")
_TRANSLATION_FIELDS = ("source_lang", "target_lang", "left_pad_source", "left_pad_target", "max_source_positions")


class _Inert:
    """An object of a class that is not imported: keeps what the pickle says about it."""

    parts: tuple[Any, ...]
    state: Any

    def __new__(cls, *parts: object, **named: object) -> _Inert:
        made = super().__new__(cls)
        made.parts = parts
        made.state = {}
        return made

    def __init__(self, *parts: object, **named: object) -> None:
        """Take anything."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PlainDict(_Inert):
    """Stands in for a dictionary with defaults: makes one without."""

    def __new__(cls, *parts: object) -> Any:
        return {}


def read_pickle(path: str) -> Any:
    """Read a ``torch.save`` file without running anything it holds.

    Raises: ValueError for a file that is damaged, no checkpoint, or asks for more than plain types, tensors and
        settings; OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        is_zip = zipfile.is_zipfile(file)
    try:
        stand_ins: list[Any] = [_stand_in(name) for name in sorted(_globals_of(path)) if _is_foreign(name)]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols; what cannot be read is an error below
            # Mapped, not read: evaluation never touches the optimizer state, which is twice the size of the model.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} cannot be read as a checkpoint: {_reason(path, error)}") from error


def _reason(path: str, error: Exception) -> str:
    with contextlib.suppress(Exception):
        rejected = [name for name in sorted(_globals_of(path)) if not _is_foreign(name) and not _is_usual(name)]
        if rejected:
            return (
                f"it asks to run {', '.join(rejected[:3])}, which no checkpoint needs; nothing was run. "
                "Get the file from a source you trust"
            )
    match = re.search(r"WeightsUnpickler error: (.+)", str(error))  # the rest advises to run the file's code
    first = match.group(1) if match else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"it is damaged, cut short, or another kind of file ({first[:200]}); copy or download it again"


def _is_foreign(name: str) -> bool:
    return bool(_FOREIGN.fullmatch(name))


def _is_usual(name: str) -> bool:
    """True if PyTorch's own files ask for it; decides the wording of an error, and nothing else."""
    return bool(_USUAL.fullmatch(name))


def _stand_in(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    kind = _PlainDict if name == "collections.defaultdict" else _Inert
    return type(qualname, (kind,), {"__module__": module})


def _globals_of(path: str) -> set[str]:
    """Names that the pickles of a file would import, found without executing them."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {name for _ in range(_PICKLES_OF_OLD_FORMAT) for name in _globals_in(file)}
        with zipfile.ZipFile(file) as archive:
            if not has_checksums(archive):
                for entry in archive.infolist():
                    entry.CRC = None  # type: ignore[assignment]  # zipfile then compares none
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return {name for pickle in pickles for name in _globals_in(archive.open(pickle))}


def _globals_in(file: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(value).replace(" ", ".", 1)
            yield _PYTHON_2_NAMES.get(name, name.replace("__builtin__.", "builtins.", 1))
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            yield ".".join(strings[-2:])
        elif isinstance(value, str):
            strings.append(value)


def plain(value: object) -> Any:
    """Settings as dictionaries, lists, strings, numbers and None; what cannot be expressed so becomes None."""
    if isinstance(value, _Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state or "_val" in state:  # omegaconf's containers and nodes
            return plain(state.get("_content", state.get("_val")))
        if type(value).__qualname__ == "Namespace":
            return plain(state)
        return plain(value.parts[0]) if len(value.parts) == 1 else None  # an enumeration's member
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, (str, bool, int, float)) else None


def read_fairseq_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint of fairseq, knnlm or TRIME; see :func:`from_fairseq` for what comes back.

    Raises: ValueError or OSError as :func:`read_pickle` and :func:`from_fairseq`.
    """
    return from_fairseq(read_pickle(path), path)


def from_fairseq(content: Any, path: str) -> dict[str, Any]:
    """Turn a file's content into ``config`` (groups of plain settings), ``model`` (weights) and ``progress``.

    The optimizer's state is dropped: its schedule and place in the data cannot be continued here.
    Raises: ValueError when it is no checkpoint, or of a model that needs settings this package has not.
    """
    weights = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no checkpoint of a model: it has no weights under 'model'")
    weights = unwrap_names(weights, path)
    settings = plain(content.get("cfg") or content.get("args"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds weights but no settings ('args' or 'cfg'), so its architecture is not known")
    nested = "task" in settings and isinstance(settings["task"], dict)
    config = _groups_of_nested(settings) if nested else _groups_of_flat(settings)
    config["written_by"] = {"program": FAIRSEQ_0_12 if nested else FAIRSEQ_0_9}
    if config["chosen"]["task"] == "language_modeling":
        config["model"] = _language_model_settings(config, weights, path)
        if holds_graph(weights):
            values, weights = config["given"], renamed(weights, path)
            config["model"] |= graph_settings(weights, values)
            config["task"] |= {name: values[name] for name in _GRAPH_FIELDS if values.get(name)}
            config["task"]["name"] = "graph_language_modeling"
    elif config["chosen"]["task"] == "translation":
        config["model"] = _translation_settings(config, weights, path)
    history = plain(content.get("optimizer_history")) or [{}]
    progress: dict[str, Any] = {"num_updates": history[-1].get("num_updates") or 0}
    extra = content.get("extra_state")
    if isinstance(extra, Mapping) and isinstance(extra.get("ema"), Mapping):  # --store-ema
        progress["ema"] = unwrap_names(extra["ema"], path)
    return {"config": config, "model": dict(weights), "progress": progress}


def unwrap_names(weights: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Weights under the names they have without wrappers such as data-parallel ones (``module.decoder...``).

    Raises: ValueError for two weights of one name, or weights that fully sharded training left flattened.
    """
    if any("flat_param" in name for name in weights):
        raise ValueError(
            f"{path} holds flattened shards of weights (fully sharded training); write a whole checkpoint with the "
            "program that trained it (fairseq: --no-use-sharded-state or consolidate_fsdp_shards)"
        )
    found: dict[str, Any] = {}
    for name, value in weights.items():
        own = _WRAPPERS.sub("", name)
        if own in found:
            raise ValueError(f"{path} holds the weight {own} twice, once as {name}; remove one of them")
        found[own] = value
    return found


def _groups_of_flat(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of fairseq 0.9 and its forks, where every flag stands beside every other."""
    chosen = {name: values.get(name) for name in ("task", "arch", "criterion", "optimizer", "lr_scheduler")}
    task = {name: values[name] for name in (*_TASK_FIELDS, *_TRANSLATION_FIELDS) if name in values}
    return {"task": task | {"name": chosen["task"]}, "model": dict(values), "chosen": chosen, "given": values}


def _groups_of_nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of fairseq 0.10 to 0.12: one dictionary per part, which may refer to another."""
    groups = {name: group for name, group in values.items() if isinstance(group, dict)}
    for group in groups.values():
        for name, value in group.items():
            group[name] = _follow(groups, value)
    model = groups.get("model", {})
    chosen = {name: groups.get(name, {}).get("_name") for name in ("task", "criterion", "optimizer", "lr_scheduler")}
    chosen["arch"] = model.get("arch") or model.get("_name")
    given = {name: value for group in groups.values() for name, value in group.items() if name != "_name"}
    return {"task": groups["task"] | {"name": chosen["task"]}, "model": model, "chosen": chosen, "given": given}


def _follow(groups: dict[str, dict[str, Any]], value: Any) -> Any:
    """Replace a reference such as ``${task.tokens_per_sample}``; ``???`` marks a missing value."""
    if value == "???":
        return None
    reference = re.fullmatch(r"\$\{(\w+)\.(\w+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    found = groups.get(reference.group(1), {}).get(reference.group(2))
    return None if isinstance(found, str) and found.startswith("${") else found


def _language_model_settings(config: dict[str, Any], weights: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The fields of TransformerLMConfig, completed from settings that old versions expressed in other ways."""
    values, task = config["model"], config["task"]
    model = _own_settings(values, TransformerLMConfig, path)
    model["max_target_positions"] = (
        values.get("max_target_positions") or task.get("max_target_positions") or task.get("tokens_per_sample") or 1024
    )
    if values.get("no_tie_adaptive_proj") is False and model.get("tie_adaptive_weights"):
        model["tie_adaptive_proj"] = True
    if "decoder_normalize_before" not in model and config["written_by"]["program"] == FAIRSEQ_0_12:
        # 0.12's default; 0.9 makes every language model pre-norm.
        model["decoder_normalize_before"] = "decoder.layer_norm.weight" in weights
    if model.get("decoder_normalize_before", True):  # before there was a flag for it, only the file shows it
        model["no_decoder_final_norm"] = "decoder.layer_norm.weight" not in weights
    if model.get("adaptive_softmax_cutoff") is not None:
        model["share_decoder_input_output_embed"] = False  # fairseq does not read it then
    return model | {"arch": config["chosen"]["arch"]}


def _translation_settings(config: dict[str, Any], weights: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The fields of TransformerConfig; see :func:`_language_model_settings`."""
    values, task = config["model"], config["task"]
    model = _own_settings(values, TransformerConfig, path)
    for side in ("source", "target"):
        name = f"max_{side}_positions"
        model[name] = values.get(name) or task.get(name) or 1024
    if model.get("decoder_normalize_before"):
        model["no_decoder_final_norm"] = "decoder.layer_norm.weight" not in weights
    return model | {"arch": config["chosen"]["arch"], "kind": "transformer"}


def _own_settings(values: Mapping[str, Any], kind: type, path: str) -> dict[str, Any]:
    """The settings that a config has. Raises: ValueError for one that changes the model and is not offered."""
    for name in _UNSUPPORTED:
        if values.get(name):
            raise ValueError(f"{path} is a model with {name}={values[name]!r}, which is not offered here")
    own = {field.name for field in fields(kind)}
    model = {name: value for name, value in values.items() if name in own and value is not None}
    dropout = values.get("activation_dropout") or values.get("relu_dropout") or 0.0
    return model | {"activation_dropout": dropout}
