"""Options of transformers. No torch here: the flags are made from these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq.config import UnreadableError, build, flag, flag_names, int_list, require_at_least
from fairseq.memory.gnn.config import GnnConfig

KEY_TAPS = ("last_ffn_input", "model_output", "separated_head", "lm_output")
_LAYER_TAP = re.compile(r"layer_([1-9]\d{0,3})")
TRAINED_PARTS = ("gnn", "gnn+softmax", "all")
ACTIVATIONS = ("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear")

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool, int), "str": (str,)}


def layer_of_tap(key_tap: str) -> int | None:
    """Number of the layer, the first one is 1, whose output is the key; None for a tap that has a name of its own."""
    found = _LAYER_TAP.fullmatch(key_tap)
    return int(found.group(1)) if found else None


def key_tap(text: str) -> str:
    """Parse a tap. Raises: UnreadableError for an unknown one, with the known ones."""
    if text not in KEY_TAPS and layer_of_tap(text) is None:
        raise UnreadableError(f"{text!r} is none of {', '.join(KEY_TAPS)}, layer_1, layer_2 and so on")
    return text


def require_tap(name: str) -> None:
    """Raise ValueError for an unknown tap."""
    try:
        key_tap(name)
    except UnreadableError as error:
        raise ValueError(f"--knn-keytype {error}") from None


@dataclass(frozen=True, kw_only=True)
class TransformerLMConfig:
    """Shape and regularisation of a transformer language model; the defaults are ``--arch transformer_lm``."""

    activation_fn: str = flag("--activation-fn", default="relu", choices=ACTIVATIONS)
    """Non-linearity of the feed-forward blocks."""
    dropout: float = flag("--dropout", default=0.1)
    """Share of a block's output, and of the embedding, that is dropped in training."""
    attention_dropout: float = flag("--attention-dropout", default=0.0)
    """Share of the attention weights that is dropped in training."""
    activation_dropout: float = flag("--activation-dropout", "--relu-dropout", default=0.0)
    """Share of the feed-forward blocks' inner units that is dropped in training."""
    decoder_embed_dim: int = flag("--decoder-embed-dim", default=512)
    """Width of the layers."""
    decoder_output_dim: int | None = flag("--decoder-output-dim", default=None)
    """Width that the output layer reads; by default that of the layers."""
    decoder_input_dim: int | None = flag("--decoder-input-dim", default=None)
    """Width of the token embedding; by default that of the layers."""
    decoder_ffn_embed_dim: int = flag("--decoder-ffn-embed-dim", default=2048)
    """Inner width of the feed-forward blocks."""
    decoder_layers: int = flag("--decoder-layers", default=6)
    """Number of layers."""
    decoder_attention_heads: int = flag("--decoder-attention-heads", default=8)
    """Attention heads of each layer."""
    decoder_normalize_before: bool = flag("--decoder-normalize-before", default=True, negatable=True)
    """Layer norm before each block (pre-norm); all named language models have it, see --restore-file for others."""
    no_decoder_final_norm: bool = flag("--no-decoder-final-norm", default=False, negatable=True)
    """No layer norm after the last layer of a pre-norm model."""
    adaptive_softmax_cutoff: tuple[int, ...] | None = flag("--adaptive-softmax-cutoff", default=None)
    """Cutoffs between the frequent head of the vocabulary and its ever rarer tails, such as 20000,60000."""
    adaptive_softmax_dropout: float = flag("--adaptive-softmax-dropout", default=0.0)
    """Share of the adaptive softmax's inputs that is dropped in training."""
    adaptive_softmax_factor: float = flag("--adaptive-softmax-factor", default=4.0)
    """Factor by which each tail of the softmax is narrower than the one before."""
    no_token_positional_embeddings: bool = flag("--no-token-positional-embeddings", default=False)
    """Give the model no positions."""
    share_decoder_input_output_embed: bool = flag("--share-decoder-input-output-embed", default=False, negatable=True)
    """Use one matrix as token embedding and as output layer."""
    character_embeddings: bool = flag("--character-embeddings", default=False)
    """Rejected: embeddings made from characters are not supported."""
    adaptive_input: bool = flag("--adaptive-input", default=False, negatable=True)
    """Give rarer tokens narrower embeddings."""
    adaptive_input_factor: float = flag("--adaptive-input-factor", default=4.0)
    """Factor by which each band of the embedding is narrower than the one before."""
    adaptive_input_cutoff: tuple[int, ...] | None = flag("--adaptive-input-cutoff", default=None)
    """Cutoffs between the bands of the embedding."""
    tie_adaptive_weights: bool = flag("--tie-adaptive-weights", default=False, negatable=True)
    """Use the bands of the adaptive input as head and tails of the adaptive softmax."""
    tie_adaptive_proj: bool = flag("--tie-adaptive-proj", default=False, negatable=True)
    """Use the projections of the adaptive input, transposed, in the adaptive softmax."""
    decoder_learned_pos: bool = flag("--decoder-learned-pos", default=False, negatable=True)
    """Learn position embeddings; by default they are sinusoids."""
    decoder_layerdrop: float = flag("--decoder-layerdrop", default=0.0)
    """Probability of leaving a layer out in training (arXiv 1909.11556)."""
    decoder_layers_to_keep: tuple[int, ...] | None = flag("--decoder-layers-to-keep", default=None)
    """Numbers of the layers that are kept of a larger checkpoint, such as 0,2,4."""
    layernorm_embedding: bool = flag("--layernorm-embedding", default=False)
    """Layer norm on the embedding."""
    no_scale_embedding: bool = flag("--no-scale-embedding", default=False)
    """Do not multiply the embedding by the square root of its width."""
    max_target_positions: int = flag("--max-target-positions", default=1024)
    """Longest input the model is made for; learned positions end there."""
    checkpoint_activations: bool = flag("--checkpoint-activations", default=False)
    """Compute each layer again for its gradients instead of keeping what it computed: less memory, more time."""
    knn_keytype: str | None = flag("--knn-keytype", default=None, parse=key_tap)
    """Inner state that is the memory key; separated_head is a linear map of last_ffn_input that is learned with it,
    layer_N the output of layer N."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in [field.name for field in fields(self) if "tuple" in str(field.type)]:
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        for name in ("decoder_output_dim", "decoder_input_dim"):  # they follow the layers' width unless they are given
            object.__setattr__(self, name, getattr(self, name) or self.decoder_embed_dim)
        self._check_choices()
        self._check_ranges()
        self._check_adaptive()

    def _check_types(self) -> None:
        """A flag's value has its type; an override's, or that of a damaged checkpoint, can have any."""
        for field in fields(self):
            kind, _, optional = str(field.type).partition(" | ")
            types, value = _TYPES.get(kind), getattr(self, field.name)
            if types is not None and not isinstance(value, types) and not (optional and value is None):
                raise ValueError(f"{flag_names(field)[0]} {value!r} is a {type(value).__name__}, {kind} is needed")

    def _check_choices(self) -> None:
        if self.character_embeddings:
            raise ValueError("--character-embeddings is not offered; use word embeddings, or --adaptive-input")
        if self.activation_fn not in ACTIVATIONS:
            raise ValueError(f"--activation-fn {self.activation_fn!r} is none of {', '.join(ACTIVATIONS)}")
        if self.knn_keytype is not None:
            require_tap(self.knn_keytype)

    def _check_ranges(self) -> None:
        shares = [field.name for field in fields(self) if "drop" in field.name]
        for name in shares:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} is not in [0, 1)")
        require_at_least(
            1,
            decoder_embed_dim=self.decoder_embed_dim,
            decoder_ffn_embed_dim=self.decoder_ffn_embed_dim,
            decoder_layers=self.decoder_layers,
            decoder_attention_heads=self.decoder_attention_heads,
            decoder_input_dim=self.decoder_input_dim,
            decoder_output_dim=self.decoder_output_dim,
            max_target_positions=self.max_target_positions,
        )
        if self.decoder_embed_dim % self.decoder_attention_heads:
            raise ValueError(
                f"--decoder-embed-dim {self.decoder_embed_dim} is not divisible by "
                f"--decoder-attention-heads {self.decoder_attention_heads}"
            )

    def _check_adaptive(self) -> None:
        if self.adaptive_input and self.adaptive_input_cutoff is None:
            raise ValueError("--adaptive-input needs --adaptive-input-cutoff, such as 20000,60000")
        for name in ("adaptive_softmax_cutoff", "adaptive_input_cutoff"):
            cutoff = (0, *(getattr(self, name) or (1,)))
            if any(low >= high for low, high in zip(cutoff, cutoff[1:])):
                raise ValueError(f"{flag_of(name)} {','.join(map(str, cutoff[1:]))} must be positive and ascending")
        if self.share_decoder_input_output_embed:
            self._check_shared()
        if self.tie_adaptive_weights:
            self._check_tied()

    def _check_shared(self) -> None:
        if self.adaptive_input or self.adaptive_softmax_cutoff is not None:
            raise ValueError(
                "--share-decoder-input-output-embed is for a plain embedding and a plain softmax; "
                "adaptive ones are shared with --tie-adaptive-weights"
            )
        if self.decoder_input_dim != self.decoder_output_dim:
            raise ValueError(
                f"--share-decoder-input-output-embed needs equal widths: --decoder-input-dim is "
                f"{self.decoder_input_dim}, --decoder-output-dim {self.decoder_output_dim}"
            )

    def _check_tied(self) -> None:
        if not self.adaptive_input or self.adaptive_softmax_cutoff is None:
            raise ValueError("--tie-adaptive-weights needs --adaptive-input and --adaptive-softmax-cutoff")
        widths = (self.decoder_input_dim, self.decoder_embed_dim, self.decoder_output_dim)
        pairs = [
            ("cutoff", self.adaptive_input_cutoff, self.adaptive_softmax_cutoff),
            ("factor", self.adaptive_input_factor, self.adaptive_softmax_factor),
        ]
        for name, of_input, of_softmax in pairs:
            if of_input != of_softmax:
                raise ValueError(
                    f"--tie-adaptive-weights: --adaptive-input-{name} {of_input} and "
                    f"--adaptive-softmax-{name} {of_softmax} must be equal"
                )
        if len(set(widths)) > 1:
            raise ValueError(
                "--tie-adaptive-weights: --decoder-input-dim {}, --decoder-embed-dim {} and --decoder-output-dim {} "
                "must be equal".format(*widths)
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerLMConfig):
    """Shape and regularisation of a translation model, whose decoder is a language model with a source to look at.

    The defaults are ``--arch transformer``.
    """

    decoder_normalize_before: bool = flag("--decoder-normalize-before", default=False, negatable=True)
    """Layer norm before each block of the decoder (pre-norm) instead of after it."""
    encoder_embed_dim: int = flag("--encoder-embed-dim", default=512)
    """Width of the encoder's layers."""
    encoder_ffn_embed_dim: int = flag("--encoder-ffn-embed-dim", default=2048)
    """Inner width of the encoder's feed-forward blocks."""
    encoder_layers: int = flag("--encoder-layers", default=6)
    """Number of the encoder's layers."""
    encoder_attention_heads: int = flag("--encoder-attention-heads", default=8)
    """Attention heads of each of the encoder's layers."""
    encoder_normalize_before: bool = flag("--encoder-normalize-before", default=False, negatable=True)
    """Layer norm before each block of the encoder (pre-norm) instead of after it."""
    encoder_learned_pos: bool = flag("--encoder-learned-pos", default=False, negatable=True)
    """Learn the source's position embeddings; by default they are sinusoids."""
    encoder_layerdrop: float = flag("--encoder-layerdrop", default=0.0)
    """Probability of leaving a layer of the encoder out in training (arXiv 1909.11556)."""
    encoder_layers_to_keep: tuple[int, ...] | None = flag("--encoder-layers-to-keep", default=None)
    """Numbers of the encoder's layers that are kept of a larger checkpoint, such as 0,2,4."""
    share_all_embeddings: bool = flag("--share-all-embeddings", default=False, negatable=True)
    """Use one matrix as embedding of both languages and as output layer; needs a joined dictionary."""
    max_source_positions: int = flag("--max-source-positions", default=1024)
    """Longest source sentence the model is made for; learned positions end there."""

    def __post_init__(self) -> None:
        if self.share_all_embeddings:
            object.__setattr__(self, "share_decoder_input_output_embed", True)
        super().__post_init__()

    def _check_ranges(self) -> None:
        super()._check_ranges()
        require_at_least(
            1,
            encoder_embed_dim=self.encoder_embed_dim,
            encoder_ffn_embed_dim=self.encoder_ffn_embed_dim,
            encoder_layers=self.encoder_layers,
            encoder_attention_heads=self.encoder_attention_heads,
            max_source_positions=self.max_source_positions,
        )
        if self.encoder_embed_dim % self.encoder_attention_heads:
            raise ValueError(
                f"--encoder-embed-dim {self.encoder_embed_dim} is not divisible by "
                f"--encoder-attention-heads {self.encoder_attention_heads}"
            )

    def _check_shared(self) -> None:
        super()._check_shared()
        if self.share_all_embeddings and self.encoder_embed_dim != self.decoder_input_dim:
            raise ValueError(
                f"--share-all-embeddings needs equal widths: --encoder-embed-dim is {self.encoder_embed_dim}, "
                f"--decoder-embed-dim {self.decoder_input_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class TransformerGnnConfig(TransformerLMConfig, GnnConfig):
    """A transformer language model whose output has read its neighbours' contexts (GNN-LM, arXiv 2110.08743).

    The defaults are ``--arch transformer_lm_gnn``.
    """

    train_params: str = flag("--train-params", default="gnn", choices=TRAINED_PARTS)
    """What is trained: the graph's layers alone, they and the output layer, or everything."""
    orig_prob_ratio: float = flag("--orig-prob-ratio", default=0.0)
    """Share of the language model's own probability in the prediction, in training and evaluation."""
    graph_probability: float = flag("--graph-probability", default=1.0)
    """Share of the training batches whose loss is that of the graph; the language model's own loss trains the others
    (with --train-params all)."""
    short_cut: bool = flag("--short-cut", default=False)
    """Leave the graph out: the language model alone."""
    graph_feature_dim: int = flag("--graph-feature-dim", default=0)
    """Width of the features of train positions; by default that of the task's, or of the model's output."""

    def __post_init__(self) -> None:
        TransformerLMConfig.__post_init__(self)
        GnnConfig.__post_init__(self)
        if self.train_params not in TRAINED_PARTS:
            raise ValueError(f"--train-params {self.train_params} is none of {', '.join(TRAINED_PARTS)}")
        require_at_least(0, graph_feature_dim=self.graph_feature_dim)
        if not 0 <= self.orig_prob_ratio < 1:
            raise ValueError(
                f"--orig-prob-ratio {self.orig_prob_ratio} is not in [0, 1); for the language model alone give "
                "--short-cut"
            )
        if not 0 < self.graph_probability <= 1:
            raise ValueError(
                f"--graph-probability {self.graph_probability} is not in (0, 1]; 1 always trains the graph"
            )
        if self.graph_probability < 1 and self.train_params != "all":
            raise ValueError(
                f"--graph-probability {self.graph_probability} trains the language model on the other batches, and "
                f"--train-params {self.train_params} leaves it as it is; give --train-params all"
            )
        self.width(self.decoder_output_dim or self.decoder_embed_dim)


def model_config_from(
    values: Mapping[str, Any], kind: type[TransformerLMConfig] = TransformerLMConfig
) -> TransformerLMConfig:
    """A config of a kind from the plain values of a checkpoint; other entries are passed over.

    Raises: ValueError when the values contradict each other.
    """
    return build(kind, values)


# Settings that a resumed run may change: regularisation, and what else leaves the computation of an input alone.
_MAY_CHANGE = (
    "drop",
    "max_target_positions",
    "max_source_positions",
    "layers_to_keep",
    "knn_keytype",
    "checkpoint_activations",
    "graph_recompute",
)


def architecture_of(config: TransformerLMConfig) -> dict[str, Any]:
    """The settings of a model that no resumed run may change."""
    names = [field.name for field in fields(config) if not any(part in field.name for part in _MAY_CHANGE)]
    return {name: getattr(config, name) for name in names}


def require_same_architecture(path: str, saved: TransformerLMConfig, asked: TransformerLMConfig) -> None:
    """Raise ValueError for a setting in which the checkpoint at ``path`` and the flags describe different models."""
    wanted = architecture_of(asked)
    for name, before in architecture_of(saved).items():
        if before != wanted[name]:
            raise ValueError(
                f"{path} is a model with {flag_of(name)} {before}, the flags ask for {wanted[name]}: it is another "
                "architecture; give the flags it was trained with, or another --save-dir"
            )


def flag_of(name: str) -> str:
    """The flag of a setting of a model."""
    known = (*fields(TransformerConfig), *fields(TransformerGnnConfig))
    return next((flag_names(field)[0] for field in known if field.name == name), f"--{name.replace('_', '-')}")


def _int_tuple(name: str, value: Any) -> tuple[int, ...] | None:
    """Read ``"1,2"``, ``[1, 2]`` or ``(1, 2)``: overrides and old checkpoints have all three."""
    if value is None or value == "":
        return None
    try:
        return int_list(value.strip("()[]")) if isinstance(value, str) else tuple(int(part) for part in value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{flag_of(name)} {value!r} is not a comma-separated list of integers (for example 20000,60000)"
        ) from None
