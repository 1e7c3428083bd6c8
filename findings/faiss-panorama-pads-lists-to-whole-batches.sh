#!/usr/bin/env bash
# faiss-cpu 1.15.1 (CPU): IVF256,FlatPanorama8 over 8,192 keys of width 64 takes 9,360 bytes a key, IVF256,Flat 272.
#
# Guess: Panorama keeps, beside a key's 4 * 64 bytes, a norm for each of its 8 levels and the whole: about 308 bytes.
# Seen: each list's storage is rounded up to whole batches, in memory and in the file, and a batch holds 1,024 keys unless
# the factory string says otherwise: lists of 32 keys take 32 times their size.
# Way out: give the size of a batch, not above that of a list: IVF256,FlatPanorama8_32.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'faiss-cpu==1.15.1' 'numpy>=1.26'
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import faiss
import numpy

keys = numpy.random.default_rng(0).standard_normal((8192, 64), dtype=numpy.float32)
sizes = {}
for factory in ("IVF256,Flat", "IVF256,FlatPanorama8", "IVF256,FlatPanorama8_32"):
    index = faiss.index_factory(64, factory)
    index.cp.min_points_per_centroid = 1
    index.train(keys)
    index.add(keys)
    sizes[factory] = len(faiss.serialize_index(index)) / len(keys)
    print(f"{factory}: {sizes[factory]:.0f} bytes per key")
sys.exit(0 if sizes["IVF256,FlatPanorama8"] > 20 * sizes["IVF256,Flat"] else "the behaviour has changed")
PYTHON
