#!/usr/bin/env bash
# numba 0.68.1 (llvmlite 0.50.0): the first call of a function that cache=True finds on disk, as machine code, takes
# about as long as compiling it, since numba imports all that it could compile: linear algebra, random numbers, lists.
#
# Guess: a cache hit reads the file and links it, in milliseconds, and imports next to nothing.
# Seen (a + b of two integers, fresh processes): compiled 0.6 to 0.7 s and 74 modules of numba imported, from the cache
# 0.4 to 0.6 s and 72. The machine code needs none of them.
# Cause: the cache asks the target's context to refresh itself before it reads the file, for every function.
# Way out, for programs that start often: a subclass of numba.core.caching.FunctionCache whose load_overload only starts
# numba's runtime and reads the file (0.04 s, no module, the same result); compiling afterwards works as ever.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'numba==0.68.1' 'llvmlite==0.50.0' 'numpy>=2,<2.5'
cd "$folder"
cat > adding.py <<'PYTHON'
import numba


@numba.njit(cache=True)
def add(a, b):
    return a + b
PYTHON
cat > first_call.py <<'PYTHON'
import sys
import time

import numba

lean = sys.argv[1] == "lean"
if lean:
    from numba.core.caching import FunctionCache
    from numba.core.runtime import rtsys

    def load(self, signature, context):
        rtsys.initialize(context)
        return self._load_overload(signature, context)

    FunctionCache.load_overload = load
before = set(sys.modules)
started = time.perf_counter()
from adding import add  # noqa: E402

assert add(1, 2) == 3
seconds = time.perf_counter() - started
own = [name for name in set(sys.modules) - before if name.startswith("numba.")]
hit = sum(add.stats.cache_hits.values())
print(f"numba {numba.__version__}, {sys.argv[1]:8}: {seconds:.2f} s, cache hits {hit}, {len(own)} modules of numba imported")
if hit != (sys.argv[1] != "compiled"):
    sys.exit("the cache was not used as expected: nothing is told about it")
if lean and len(own) > 5:
    sys.exit("changed since numba 0.68.1: without a refresh it imports as much")
if not lean and len(own) < 40:
    sys.exit("changed since numba 0.68.1: little is imported for a function of the cache")
if lean:
    assert numba.njit(lambda x: x.sum())(__import__("numpy").arange(4)) == 6  # what is compiled now finds all it needs
PYTHON
for how in compiled cached lean; do
  NUMBA_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" first_call.py "$how"
done
