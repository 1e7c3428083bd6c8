"""Options of tasks: their data, and how it is cut and padded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq.config import UnreadableError, flag, flag_names, require_at_least
from fairseq.memory.gnn.config import GraphConfig

BREAK_MODES = ("none", "complete", "complete_doc", "eos")
GRAPH_TASK = "graph_language_modeling"
"""Name of the task of a GNN-LM."""
_OF_EVALUATION = ("graph_states", "gcn_context_window")  # which has them by its own flags alone


def overridden_limits(overrides: Mapping[str, Any] | None) -> dict[str, int]:
    """Longest sentences that --model-overrides names: they are limits of the data too, unless flags name others.

    Raises: ValueError for one that is no positive integer.
    """
    names = ("max_source_positions", "max_target_positions")
    found = {name: value for name, value in (overrides or {}).items() if name in names}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"--model-overrides: {name} {value!r} is not a positive integer; give one")
    return found


@dataclass(frozen=True, kw_only=True)
class LanguageModelingConfig:
    """Text as blocks for next-token prediction."""

    data: str = flag("data")
    """Folder made by preprocess.py; several separated by colons take turns by epoch."""
    sample_break_mode: str = flag("--sample-break-mode", default="none", choices=BREAK_MODES)
    """Permitted ends of blocks: anywhere, after whole sentences (within a document), or after every sentence."""
    tokens_per_sample: int = flag("--tokens-per-sample", default=1024)
    """Largest number of tokens in a block."""
    add_bos_token: bool = flag("--add-bos-token", default=False)
    """Begin each block with <s>."""
    max_target_positions: int | None = flag("--max-target-positions", default=None)
    """Longest input of the model; by default --tokens-per-sample."""

    def __post_init__(self) -> None:
        require_at_least(1, tokens_per_sample=self.tokens_per_sample, max_target_positions=self.max_target_positions)


def _true_or_false(text: object) -> bool:
    """Read "True" or "False", as fairseq's padding flags take them and its checkpoints keep them."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = known.get(str(text).lower())
    if found is None:
        raise UnreadableError(f"{text!r} is neither True nor False")
    return found


def _json_dict(text: str) -> dict[str, Any]:
    """Read a JSON object. Raises: UnreadableError when it is anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UnreadableError(f'{text!r} is no JSON object, such as {{"beam": 5}}')
    return found


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """Sentence pairs of two languages."""

    data: str = flag("data")
    """Folder made by preprocess.py; several separated by colons take turns by epoch."""
    source_lang: str | None = flag("--source-lang", "-s", default=None)
    """Source language; by default that of the folder's files."""
    target_lang: str | None = flag("--target-lang", "-t", default=None)
    """Target language; by default that of the folder's files."""
    left_pad_source: bool = flag("--left-pad-source", default=True, parse=_true_or_false)
    """Pad the source on the left (True) or on the right (False)."""
    max_source_positions: int = flag("--max-source-positions", default=1024)
    """Longest source sentence, in tokens."""
    max_target_positions: int = flag("--max-target-positions", default=1024)
    """Longest target sentence, in tokens."""
    truncate_source: bool = flag("--truncate-source", default=False)
    """Cut source sentences to --max-source-positions tokens instead of leaving the pair out."""
    eval_bleu: bool = flag("--eval-bleu", default=False)
    """Translate the validation set in every validation, and report BLEU."""
    eval_bleu_args: dict[str, Any] | None = flag("--eval-bleu-args", default=None, parse=_json_dict)
    """JSON of generation settings for it, such as {"beam": 5, "max_len_a": 1.2, "max_len_b": 10}."""
    eval_bleu_detok_args: dict[str, Any] | None = flag("--eval-bleu-detok-args", default=None, parse=_json_dict)
    """JSON of settings of --eval-bleu-detok, such as {"moses_no_escape": true}."""
    eval_tokenized_bleu: bool = flag("--eval-tokenized-bleu", default=False)
    """Compare tokens as they are instead of detokenised text."""
    eval_bleu_print_samples: bool = flag("--eval-bleu-print-samples", default=False)
    """Log the first translation of each validation, with its reference."""
    eval_bleu_detok: str = flag("--eval-bleu-detok", default="space", choices=("moses", "nltk", "space"))
    """How words of the target become text: by the rules of Moses or nltk, or as they are."""
    eval_bleu_remove_bpe: str | None = flag("--eval-bleu-remove-bpe", default=None, const="@@ ")
    """Mark that joins the pieces of a word of the target."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_pad_source", _true_or_false(self.left_pad_source))
        require_at_least(
            1, max_source_positions=self.max_source_positions, max_target_positions=self.max_target_positions
        )
        if self.source_lang is not None and self.source_lang == self.target_lang:
            raise ValueError(f"--source-lang and --target-lang are both {self.source_lang!r}; they must differ")


@dataclass(frozen=True, kw_only=True)
class GraphStoresConfig(GraphConfig):
    """The neighbours of a text, and what is read of them (GNN-LM, arXiv 2110.08743)."""

    graph_stores: str | None = flag("--graph-stores", default=None)
    """Folder of a datastore for each split, FOLDER/train and so on, and of their neighbours FOLDER/SPLIT.neighbors."""
    graph_features: str | None = flag("--graph-features", default=None)
    """What is read of train positions: another datastore of the train split, or a file of product-quantizer codes; by
    default the keys of FOLDER/train."""
    graph_states: str | None = flag("--graph-states", default=None)
    """In evaluation, file of the states of all train positions, which is written first where it is missing."""
    gcn_k: int | None = flag("--gcn-k", default=None)
    """Neighbours that a token reads; by default all that are kept."""
    gcn_context_window: int | None = flag("--gcn-context-window", default=None)
    """Tokens before the scored ones of a block that the graph's layers read too; by default all of --context-window."""
    use_precompute_feat: bool = flag("--use-precompute-feat", default=False, negatable=True)
    """Take the language model's own states from FOLDER/SPLIT too, instead of computing them; evaluation does what
    training did."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, gcn_k=self.gcn_k)
        require_at_least(0, gcn_context_window=self.gcn_context_window)


@dataclass(frozen=True, kw_only=True)
class GraphLanguageModelingConfig(LanguageModelingConfig, GraphStoresConfig):
    """Text as blocks for next-token prediction, with the neighbours of every token."""

    def __post_init__(self) -> None:
        LanguageModelingConfig.__post_init__(self)
        GraphStoresConfig.__post_init__(self)
        if not self.graph_stores:
            raise ValueError(
                "give --graph-stores FOLDER: a GNN-LM reads the neighbours of its text, which eval_lm.py "
                "--save-knnlm-dstore and fairseq-neighbors find"
            )


def graph_options(
    trained: Mapping[str, Any], stated: Mapping[str, Any], overrides: Mapping[str, Any] | None, path: str | None
) -> dict[str, Any] | None:
    """Options of the graph for a checkpoint that is evaluated: those it was trained with, unless others are stated.

    Args:
        trained: settings of the checkpoint's task.
        stated: options of a task that the user gave.
        overrides: --model-overrides.
        path: the checkpoint, named in errors.
    Returns: None for a model without a graph, which a GNN-LM is too when --model-overrides takes the short cut.
    Raises: ValueError for an option of the graph that is stated for such a model.
    """
    flags = {field.name: flag_names(field)[0] for field in fields(GraphStoresConfig)}
    given = {name: value for name, value in stated.items() if name in flags}
    alone = bool((overrides or {}).get("short_cut"))
    if trained.get("name") == GRAPH_TASK and not alone:
        kept = {name: value for name, value in trained.items() if name in flags}
        return kept | dict.fromkeys(_OF_EVALUATION) | given
    for name in given:
        raise ValueError(
            f"{flags[name]} is for a GNN-LM, and {path} is "
            + ("taken without its graph (short_cut)" if alone else "none; train one with --arch transformer_lm_gnn")
            + ", or leave the flag out"
        )
    return None
