"""Exact search on a GPU, without one: PyTorch's operations or Triton's interpreter stand in for its kernel.

The cases and what they are compared with are in ``gpu_search_cases.py``.
"""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import gpu_search_cases as cases
import pytest
import torch

from fairseq.memory.index import opening
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.types import Metric

ROOT = Path(__file__).resolve().parents[4]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq.memory.index.exact.triton_kernels import _collect_tile

types = dict.fromkeys(("query", "scale_M", "bias_M", "threshold_N", "score_NC"), "*fp32")
types |= {"filled_N": "*i32", "row_NC": "*i64"}
blocks = {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_D": 32}
types |= dict.fromkeys(blocks, "constexpr")
for key, row, capability in (("*fp32", "i64", 80), ("*fp16", "i32", 80), ("*bf16", "i32", 90)):
    signature = {name: (types | {"key": key, "first_row": row}).get(name, "i32") for name in _collect_tile.arg_names}
    code = triton.compile(ASTSource(_collect_tile, signature, blocks), target=GPUTarget("cuda", capability, 32)).asm
    assert code["cubin"]
    assert "fma.rn.f32" in code["ptx"] and "tf32" not in code["ptx"]
print("right")
"""


def run(*command: str, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), clean.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("name", cases.CASES)
def test_any_collector_gives_the_bits_of_the_cpu(name):
    verdict = cases.verdict(name)
    assert verdict == "right", verdict


@pytest.fixture(scope="module")
def interpreted():
    """What each case says of the kernel."""
    return json.loads(run("-m", "gpu_search_cases", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.parametrize("name", cases.CASES)
def test_the_interpreted_kernel_gives_the_bits_of_the_cpu(name, interpreted):
    assert interpreted[name] == "right", interpreted[name]


@needs_triton
def test_the_kernel_compiles_for_ampere_and_hopper_in_full_float32(tmp_path):
    assert run("-c", COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "right"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resident_bytes", [0, None])
def test_a_gpu_gives_the_bits_of_the_cpu(metric, dtype, resident_bytes):
    keys, queries = cases.drawn(50000, 1, 200).to(dtype), cases.drawn(300, 2, 200)
    index = ExactIndex(keys, metric)
    index.use_gpus(resident_bytes=resident_bytes)
    with cases.left_to_the_cpu() as left:
        found = index.search(queries, 100)
    assert not left
    cases.same_bits(found, ExactIndex(keys, metric).search(queries, 100))


def test_a_device_that_fails_is_named_once_and_the_cpu_searches(caplog):
    keys, queries = cases.drawn(100, 1), cases.drawn(3, 2)
    index = ExactIndex(keys)
    cases.attach_plain(index)
    index._by_gpu._collect = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    expected = ExactIndex(keys).search(queries, 4)
    for _ in range(2):
        cases.same_bits(index.search(queries, 4), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CUDA out of memory" in caplog.text


def test_one_line_says_why_the_cpu_searches(caplog):
    index = ExactIndex(cases.drawn(10, 1))
    with caplog.at_level(logging.INFO), mock.patch.object(torch.cuda, "is_available", return_value=False):
        index.use_gpus()
    assert index._by_gpu is None
    assert "there is no GPU" in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_opening_asks_for_gpus_where_the_settings_do(wanted):
    keys = ExactIndex(cases.drawn(10, 1)).keys
    store = mock.Mock(has_keys=True, keys=keys, deleted=None)
    store.__len__ = lambda _: 10
    with mock.patch.object(ExactIndex, "use_gpus") as asked:
        opening.open_index(store, gpu=wanted)
    assert asked.called == wanted
