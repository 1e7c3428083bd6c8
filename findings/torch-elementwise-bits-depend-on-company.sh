#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): an element-wise function can round one and the same number differently depending on how many
# other numbers stand in the tensor.
#
# Guess: f(x)[i] == f(x[i:i+1]) bit for bit, because nothing is summed and elements do not meet.
# Seen (ATEN_CPU_CAPABILITY=avx2, one thread, 1,000 float32 numbers): true of exp, log, log1p, tanh, sin and erf; not of
# logaddexp (22 elements, up to 4.8e-7), sigmoid (84), softplus (95) and gelu (405), whose full vectors take another
# implementation than the elements left over at the end. A batch cut in another place, another number of threads or
# another CPU therefore changes the last bits of a loss that is made of element-wise steps alone.
# Way out where bits must not depend on the batch: write the function with exp and log1p, for example
# max(a, b) + log1p(exp(-|a - b|)) for logaddexp.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy>=1.26'
ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
a, b = -9 * torch.rand(1000, generator=generator), -9 * torch.rand(1000, generator=generator)
functions = {
    "exp": torch.exp,
    "log": lambda x, *_: torch.log(-x),
    "log1p": lambda x, *_: torch.log1p(-x),
    "tanh": torch.tanh,
    "sin": torch.sin,
    "erf": torch.erf,
    "logaddexp": None,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "gelu": torch.nn.functional.gelu,
}
depends = {"logaddexp", "sigmoid", "softplus", "gelu"}
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
changed = []
for name, function in functions.items():
    call = torch.logaddexp if function is None else lambda x, _, function=function: function(x)
    together = call(a, b)
    alone = torch.cat([call(a[i : i + 1], b[i : i + 1]) for i in range(len(a))])
    count, largest = int((together != alone).sum()), float((together - alone).abs().max())
    print(f"{name:10} {count:4d} of {len(a)} elements have other bits alone, by up to {largest:.1e}")
    if (count > 0) != (name in depends):
        changed.append(name)
if changed:
    sys.exit(f"changed since torch 2.13.0: {', '.join(changed)}")
PYTHON
