#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata become files of other bytes in each process; within one process
# too from call to call. Tensors are sorted, metadata are not.
#
# Guess: a format that sorts its tensors by type and name writes the same bytes for the same content, so that files can be
# compared by their digests and a killed job that runs again leaves the file it would have left.
# Seen: with eight entries of metadata five processes wrote files of five contents, all of one size, that differ in
# the order of the entries of "__metadata__" in the header alone; with no entry or one entry all are equal. Setting
# PYTHONHASHSEED changes nothing, since the order is that of a map on the library's side.
# Way out: give one entry that holds everything, such as a JSON text with sorted keys, or put the header's entries in order
# after writing (the header may be padded with spaces to its length).
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.4.6'
cat > "$folder/write.py" <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save_file

path, entries = sys.argv[1], int(sys.argv[2])
save_file({"a": np.arange(4), "b": np.ones(3)}, path, {f"entry{i}": str(i) for i in range(entries)} or None)
with open(path, "rb") as file:
    content = file.read()
length = int.from_bytes(content[:8], "little")
print(hashlib.sha256(content).hexdigest(), len(content), hashlib.sha256(content[8 + length :]).hexdigest())
PYTHON
for entries in 0 1 8; do
  for _ in 1 2 3 4 5; do
    PYTHONHASHSEED=0 "$folder/venv/bin/python" "$folder/write.py" "$folder/file.safetensors" "$entries"
  done > "$folder/out.$entries"
done
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

found = {}
for entries in (0, 1, 8):
    with open(f"{sys.argv[1]}/out.{entries}", encoding="utf-8") as file:
        whole, sizes, tensors = (set(column) for column in zip(*map(str.split, file)))
    found[entries] = len(whole)
    print(f"{entries} entries of metadata: {len(whole)} contents of {len(sizes)} size in 5 processes, {len(tensors)} of the tensors")
    assert len(sizes) == len(tensors) == 1, "sizes or tensors differ"
assert found[0] == found[1] == 1 < found[8], f"the behaviour has changed: {found}"
PYTHON
