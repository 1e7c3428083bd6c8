"""``fairseq.utils``: small helpers of scripts and plug-ins.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq.config.plugins import import_user_dir
from fairseq.data.dictionary import join_pieces
from fairseq.metrics.training import perplexity
from fairseq.modules.transformer_layer import ACTIVATION_FUNCTIONS
from fairseq.registry import lookup

_SPACE = re.compile(r"\s+")


def tokenize_line(line: str) -> list[str]:
    """The words of a line."""
    return _SPACE.sub(" ", line).strip().split()


def apply_to_sample(function: Callable[[Tensor], Any], sample: Any) -> Any:
    """The same structure of dictionaries, lists, tuples and sets with ``function`` of every tensor."""
    if isinstance(sample, Tensor):
        return function(sample)
    if isinstance(sample, Mapping):
        return {key: apply_to_sample(function, value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple, set)):
        return type(sample)(apply_to_sample(function, value) for value in sample)
    return sample


def move_to_cuda(sample: Any, device: Any = None) -> Any:
    """A sample on a GPU, the current one by default."""
    return apply_to_sample(lambda tensor: tensor.to(device or "cuda", non_blocking=True), sample)


def move_to_cpu(sample: Any) -> Any:
    """A sample on the CPU, floating point numbers in float32."""
    return apply_to_sample(lambda t: t.cpu().float() if t.dtype in (torch.float16, torch.bfloat16) else t.cpu(), sample)


def item(tensor: Any) -> Any:
    """The number in a one-element tensor; anything else as it is."""
    return tensor.item() if hasattr(tensor, "item") else tensor


def strip_pad(tensor: Tensor, pad: int) -> Tensor:
    """The elements that are no padding."""
    return tensor[tensor.ne(pad)]


def buffered_arange(max: int, device: Any = None) -> Tensor:
    """0, 1, ..., max - 1."""
    return torch.arange(max, device=device)


def fill_with_neg_inf(tensor: Tensor) -> Tensor:
    """A float32 tensor of this shape, all minus infinity."""
    return torch.full_like(tensor, float("-inf"), dtype=torch.float32)


def softmax(x: Tensor, dim: int, onnx_trace: bool = False) -> Tensor:
    """Softmax in float32."""
    return F.softmax(x, dim=dim, dtype=torch.float32)


def log_softmax(x: Tensor, dim: int, onnx_trace: bool = False) -> Tensor:
    """Log of the softmax in float32."""
    return F.log_softmax(x, dim=dim, dtype=torch.float32)


def get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    """The function that ``--activation-fn`` names. Raises: ValueError for an unknown one."""
    return lookup(ACTIVATION_FUNCTIONS, activation, "--activation-fn")


def get_perplexity(loss: Any, round: int = 2, base: int = 2) -> float:
    """``base ** loss``, rounded; 0 for no loss."""
    if loss is None:
        return 0.0
    value = float(item(loss))
    return float(np.round(perplexity(value * float(np.log2(base))), round))


def make_positions(tensor: Tensor, padding_idx: int, onnx_trace: bool = False) -> Tensor:
    """Positions of tokens (B, T), from padding_idx + 1 on; padding has the position padding_idx."""
    kept = tensor.ne(padding_idx)
    return kept.cumsum(1) * kept + padding_idx


def clip_grad_norm_(params: Iterable[Tensor] | Tensor, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
    """Scale gradients to a norm of at most ``max_norm`` (0: leave them); returns the norm before."""
    kept = [params] if isinstance(params, Tensor) else list(params)
    return torch.nn.utils.clip_grad_norm_(kept, max_norm if max_norm > 0 else float("inf"))


def has_parameters(module: torch.nn.Module) -> bool:
    """True if a module has weights."""
    return any(True for _ in module.parameters())


def eval_str_list(text: Any, type: Callable[[Any], Any] = float) -> list[Any] | None:
    """``"1,2"`` or ``"[1, 2]"`` or a number as a list; nothing is evaluated."""
    if text is None:
        return None
    parts = text.strip("()[] ").split(",") if isinstance(text, str) else text
    return [type(part) for part in parts] if isinstance(parts, (list, tuple)) else [type(parts)]


def eval_bool(text: Any, default: bool = False) -> bool:
    """``"True"`` or ``"False"`` as a bool; None is the default."""
    return default if text is None else text in (True, 1, "True", "true", "1")


def convert_padding_direction(
    src_tokens: Tensor, padding_idx: int, right_to_left: bool = False, left_to_right: bool = False
) -> Tensor:
    """Rows (B, T) padded on the right become padded on the left, or the other way round."""
    kept = src_tokens.ne(padding_idx)
    order = torch.argsort(kept if right_to_left else ~kept, dim=1, stable=True)
    return src_tokens.gather(1, order)


def post_process_prediction(
    hypo_tokens: Tensor, src_str: str, alignment: Any, align_dict: Any, tgt_dict: Any, remove_bpe: str | None = None
) -> tuple[Tensor, str, Any]:
    """Tokens, their text, and the alignment as it was. Raises: ValueError for a replacement by an alignment."""
    if align_dict is not None:
        raise ValueError("an alignment dictionary is not offered; give align_dict=None")
    return hypo_tokens, join_pieces(tgt_dict.string(hypo_tokens), remove_bpe), alignment


def import_user_module(settings: Any) -> None:
    """Import the plug-in at ``args.user_dir``, if one is named."""
    path = getattr(settings, "user_dir", None)
    if path:
        import_user_dir(path)


def set_torch_seed(seed: int) -> None:
    """Seed PyTorch's random numbers."""
    torch.manual_seed(seed)
