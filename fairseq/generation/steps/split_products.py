"""Products of few rows with the matrices of a model, by AMX on all threads (``split_kernels.py``).

32 rows by 768 x 50,257 take 8.5 instead of 18.5 ms (oneDNN) on two threads, and 17 instead of 36 on one, where no cache
holds the matrix. Reading it takes 5.7, at 13.5 GB/s and core; the products alone, of what a cache holds, would take 3.

Numbers whose parts are below float32's least normal one, those under about 1e-33, lose digits; an infinity gives NaN.

Shapes: R rows, D width, V width of the result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fairseq.runtime import hardware
from fairseq.runtime.threads import openmp_team

_MOST_NUMBERS = 1 << 18  # of all rows: their parts are 1.5 MB, and with more the libraries are as fast
_COLUMNS = 32  # of a register
_EMPTY = torch.empty(0, dtype=torch.float32)


@functools.cache
def is_available() -> bool:
    """True if this CPU, the system and the compiler have AMX's products of bfloat16."""
    if "amx_bf16" not in hardware.cpu_features():
        return False
    from fairseq.generation.steps import split_kernels

    return split_kernels.IS_COMPILED and hardware.may_use_matrix_registers()


def product(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor | None:
    """``x @ weight.T + bias``; None for what other products are for."""
    (team, threads), width = openmp_team(), x.shape[-1]
    are_many, is_alone = x.numel() > _MOST_NUMBERS, threads < torch.get_num_threads()
    if are_many or is_alone or not weight_VD.is_contiguous() or not is_available():
        return None
    from fairseq.generation.steps import split_kernels

    if width % _COLUMNS:
        return None
    row_RD, bias = x.reshape(-1, width).contiguous(), _EMPTY if bias_V is None else bias_V.contiguous()
    out_RV = torch.empty(len(row_RD), len(weight_VD), dtype=torch.float32)
    row, weight, of_types, out = (each.detach().numpy() for each in (row_RD, weight_VD, bias, out_RV))
    split_kernels.multiply(row, weight, of_types, out, team, threads)
    return out_RV.view(*x.shape[:-1], -1)
