#!/usr/bin/env bash
# faiss 1.15.1 (CPU): a product quantizer whose parts have 16 columns or more makes a table of 64 KB for every key (64
# parts) before it codes the first one: 1 GB for 16,384 keys. In calls of 256 keys the codes are the same, in a third of
# the time.
#
# Guess: compute_codes(keys) needs, beside keys and codes, memory for some keys per thread, and the time of one call is
# at most that of many small ones.
# Seen (16,384 keys of width 1024, 64 parts of 8 bits, one thread): one call takes 1.0 GB more than the keys and codes
# and 2.2 to 3 times as long as 64 calls of 256 keys, which take 16 MB; all codes are equal. With parts of 8 columns
# there is no table, and both ways take equally long. An index IVF1024,PQ64 codes its keys so too. The variable
# faiss.cvar.product_quantizer_compute_codes_bs (262,144 keys) decides the size of the table: 256 is the faster value.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'faiss-cpu==1.15.1' 'numpy>=1.26'
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import resource
import sys
import time

import faiss
import numpy as np

KEYS = np.random.default_rng(0).standard_normal((16_384, 1024), dtype=np.float32)


def coded(parts, at_once):
    """Codes, seconds, and MB that the peak memory grew by."""
    quantizer = faiss.ProductQuantizer(1024, parts, 8)
    centroids = np.random.default_rng(1).standard_normal(256 * 1024).astype(np.float32)
    faiss.copy_array_to_vector(centroids, quantizer.centroids)
    faiss.cvar.product_quantizer_compute_codes_bs = at_once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = []
    for _ in range(3):
        began = time.perf_counter()
        codes = quantizer.compute_codes(KEYS)
        took.append(time.perf_counter() - began)
    return codes, min(took), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


few, few_seconds, few_mb = coded(64, 256)
narrow, narrow_seconds, narrow_mb = coded(128, 262_144)
all_, all_seconds, all_mb = coded(64, 262_144)
print(f"64 parts of 16 columns: at once {all_seconds:.2f} s, {all_mb:.0f} MB; in calls of 256 {few_seconds:.2f} s, {few_mb:.0f} MB")
print(f"128 parts of 8 columns, at once: {narrow_seconds:.2f} s, {narrow_mb:.0f} MB")
if not np.array_equal(few, all_):
    sys.exit("changed since faiss 1.15.1: the codes differ")
if all_mb < 800 or few_mb > 200 or narrow_mb > 200:
    sys.exit("changed since faiss 1.15.1: the table is another")
if all_seconds < 1.3 * few_seconds:
    sys.exit("changed since faiss 1.15.1: one call is no slower than many")
PYTHON
