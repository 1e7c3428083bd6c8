#!/usr/bin/env bash
# numba 0.68.1 (llvmlite 0.50.0): the largest of many float32 is found one number at a time, however it is written and
# with fastmath=True too; the same loop over int32, and a sum of the float32, become vector instructions.
#
# Guess: fastmath=True, which lets a sum be taken in any order, lets a maximum be as well: with neither NaN nor the sign
# of zero to be minded, max(m, x) is one vector instruction.
# Seen (4,096 numbers, a CPU with AVX-512): sum with fastmath 0.3 us, without 2.7; maximum of int32 0.3 us; maximum of
# float32 by max(m, x), by max(x, m), by an if, by a conditional expression and by numpy.max 4.5 us, with fastmath or
# without, and not one vector of floats in the optimised code.
# Way out: the bits of a float32, those of a negative one but the sign inverted, are ordered as the floats are: a view as
# int32, bits ^ ((bits >> 31) & 0x7fffffff), and the maximum of these.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'numba==0.68.1' 'llvmlite==0.50.0' 'numpy>=2,<2.5'
"$folder/venv/bin/python" - <<'PYTHON'
import re
import sys
import timeit

import llvmlite
import numba
import numpy as np


def total(x):
    m = np.float32(0)
    for i in range(len(x)):
        m += x[i]
    return m


def by_max(x):
    m = np.float32(-np.inf)
    for i in range(len(x)):
        m = max(m, x[i])
    return m


def by_other_max(x):
    m = np.float32(-np.inf)
    for i in range(len(x)):
        m = max(x[i], m)
    return m


def by_if(x):
    m = np.float32(-np.inf)
    for i in range(len(x)):
        if x[i] > m:
            m = x[i]
    return m


def by_choice(x):
    m = np.float32(-np.inf)
    for i in range(len(x)):
        m = x[i] if x[i] > m else m
    return m


def by_numpy(x):
    return np.max(x)


def of_integers(x):
    m = np.int32(-(2**31))
    for i in range(len(x)):
        m = max(m, x[i])
    return m


def of_bits(x):
    bits = x.view(np.int32)
    m = np.int32(-(2**31))
    for i in range(len(x)):
        m = max(m, bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return m


print(f"numba {numba.__version__}, llvmlite {llvmlite.__version__}, numpy {np.__version__}")
maxima = (by_max, by_other_max, by_if, by_choice, by_numpy)
vectors = {}
for function, kind in ((total, "f4"), *((each, "f4") for each in maxima), (of_integers, "i4"), (of_bits, "f4")):
    for fast in (False, True):
        kernel = numba.njit(f"({kind}[::1],)", fastmath=fast)(function)
        x = np.arange(4096).astype(kind)
        seconds = min(timeit.repeat(lambda: kernel(x), number=200, repeat=5)) / 200
        code = "".join(kernel.inspect_llvm().values())
        vectors[function, fast] = len(re.findall(r"<\d+ x (?:float|i32)>", code))
        print(f"{function.__name__:12} fastmath {fast!s:5}: {vectors[function, fast]:3} vectors, {1e6 * seconds:.2f} us")
if not (vectors[total, True] and vectors[of_integers, False] and vectors[of_bits, False]):
    sys.exit("changed since numba 0.68.1: a sum with fastmath, or a maximum of integers, is not vectorized")
if any(vectors[each, fast] for each in maxima for fast in (False, True)):
    sys.exit("changed since numba 0.68.1: a maximum of floats is vectorized")
PYTHON
