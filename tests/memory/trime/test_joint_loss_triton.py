"""The CUDA kernel of the joint loss, without CUDA: run by Triton's interpreter, and compiled for two GPUs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]

INTERPRETED = """
import sys
import torch
from unittest import mock
sys.path[:0] = ["tests/helpers", "tests/memory/trime"]
from test_joint_loss import EXTREMES, RULES, Case, sizes
from fairseq.memory.trime import triton_kernels as fused
from fairseq.memory.trime.joint_loss import apply

def loss_of(case):
    return apply(fused.compute_on_gpu, case.key, case.logp, case.norm, case.memory, case.other)

def check(case, loose=1e-4):
    inputs = case.inputs
    ours = loss_of(case)
    theirs = case.plain()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    for mine, true in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, theirs))):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=loose)

torch.use_deterministic_algorithms(True)  # memory nobody has written to is NaN
with sizes(6, 4), mock.patch.object(fused, "_BLOCK", 8):
    for number, rule in enumerate(RULES.values()):
        check(Case.draw([7, 0, 4, 1], rule, num_other=[None, 5][number % 2], dtype=torch.float32))
    for extreme in EXTREMES.values():
        case = Case.draw([5, 4], RULES["external"], dtype=torch.float32)
        extreme(case)
        with torch.no_grad():
            ours = loss_of(case)
        torch.testing.assert_close(ours.double(), case.plain(), rtol=1e-5, atol=1e-4)
    # On a GPU half-precision keys are multiplied as they are, with sums in float32; processors have no such product.
    mm = torch.mm
    widening = lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype))
    for dtype in (torch.float16, torch.bfloat16):
        with mock.patch.object(torch, "mm", widening), mock.patch.object(fused, "can_widen", lambda key: True):
            case = Case.draw([7, 4], RULES["long"], num_other=3, dtype=torch.float32)
            case.key = case.key.detach().to(dtype).requires_grad_()
            case.other = case.other.detach().to(dtype).requires_grad_()
            check(case, loose=2e-2)
    empty = Case.draw([4], RULES["elsewhere"], dtype=torch.float32)
    assert loss_of(empty) == (-empty.logp).sum()
print("right")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq.memory.trime.triton_kernels import _weigh_row

floats = dict.fromkeys(("score", "norm_N", "whole_N", "target_N"), "*fp32")
whole = dict.fromkeys(("token", "other_token", "first_N", "past_N", "later_N"), "*i64")
for weight, wants, capability in (("*fp32", False, 80), ("*fp16", True, 80), ("*bf16", True, 90)):
    types = floats | whole | {"weight": weight, "gain": "fp32", "WANTS_WEIGHTS": "constexpr", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in _weigh_row.arg_names}
    source = ASTSource(_weigh_row, signature, {"WANTS_WEIGHTS": wants, "BLOCK": 1024})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
print("right")
"""


def run(script, **env):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_interpreter_gets_the_formulas_loss_and_gradients():
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "right"


def test_the_kernel_compiles_for_ampere_and_hopper(tmp_path):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "right"
