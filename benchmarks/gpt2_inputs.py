"""GPT-2 small's shape cut to four layers, as a model of either side with the same weights, for peers' benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, LAYERS, WIDTH, HEADS, POSITIONS = 50_257, 4, 768, 12, 1024
SHAPE = (
    f"--arch transformer_lm_gpt3_small --activation-fn gelu_accurate --no-scale-embedding --decoder-layers {LAYERS} "
    f"--decoder-embed-dim {WIDTH} --decoder-attention-heads {HEADS} --max-target-positions {POSITIONS}"
)
"""Flags of train.py for the shape; no dropout, so that both sides compute the same losses."""


def make_data(folder: Path, num_tokens: int) -> Path:
    """A data folder of made-up text whose dictionary has as many types as GPT-2's."""
    common.make_text(folder, num_tokens, VOCABULARY - 4)  # the dictionary adds four symbols of its own
    data = folder / "data-bin"
    prefixes = ("--trainpref", str(folder / "train.txt"), "--validpref", str(folder / "valid.txt"))
    common.run("preprocess.py", "--only-source", "--padding-factor", "1", *prefixes, "--destdir", str(data))
    return data


def peer() -> Any:
    """transformers' GPT-2 of the shape, freshly initialised, without dropout and without a cache of keys."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, use_cache=False, bos_token_id=0, eos_token_id=2))


def weights_of(model: Any) -> dict[str, Tensor]:
    """The peer's weights under fairseq's names; its maps are transposed, and positions begin after the padding."""
    import torch

    found = model.transformer.state_dict()
    pad = 1
    rows = found["wpe.weight"]
    state = {
        "decoder.embed_tokens.weight": found["wte.weight"],
        "decoder.output_projection.weight": found["wte.weight"],
        "decoder.embed_positions.weight": torch.cat([rows.new_zeros(pad + 1, WIDTH), rows]),
        "decoder.version": torch.full((1,), 3.0),
    }
    names = {"ln_1": "self_attn_layer_norm", "ln_2": "final_layer_norm", "attn.c_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
    for end in ("weight", "bias"):
        state[f"decoder.layer_norm.{end}"] = found[f"ln_f.{end}"]
        for number in range(LAYERS):
            theirs, ours = f"h.{number}", f"decoder.layers.{number}"
            for name, own in names.items():
                value = found[f"{theirs}.{name}.{end}"]
                state[f"{ours}.{own}.{end}"] = value.t() if value.dim() == 2 else value
            parts = found[f"{theirs}.attn.c_attn.{end}"].t().chunk(3)
            for own, value in zip(("q_proj", "k_proj", "v_proj"), parts):
                state[f"{ours}.self_attn.{own}.{end}"] = value
    return state


def own() -> Any:
    """Our model with the peer's weights, in evaluation mode."""
    from fairseq.models.architectures import build_model_config
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.options import parse_train

    settings = parse_train(["data", "--no-save", *SHAPE.split()])
    config = build_model_config(settings.chosen["arch"], settings.given)
    model = TransformerLanguageModel.unfilled(config, VOCABULARY, 1)
    model.load_state_dict(weights_of(peer()))
    return model.eval()
