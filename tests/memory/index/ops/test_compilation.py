"""The line that is logged when kernels are compiled, and only then."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import logging
logging.basicConfig(level="INFO", format="%(name)s %(message)s")
import numpy as np
from fairseq.memory.index.ops.kernels import approx_kth_largest
for k in (1, 2):
    approx_kth_largest(np.arange(9, dtype=np.float32), k)
approx_kth_largest(np.arange(9, dtype=np.float64), 1)
"""


def test_the_first_compilation_is_announced_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    lines = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        lines.append(done.stderr.count("fairseq.memory.index.ops.kernels compiling kernels, once per machine"))
    assert lines == [1, 0]
