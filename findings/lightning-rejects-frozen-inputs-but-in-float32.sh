#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0 (CPU): a module of Fabric takes a frozen dataclass as input in float32, and raises in
# every other precision. What an ordinary dataclass holds is cast there, in a copy; what an ordinary object holds is not.
#
# Guess: Fabric's precision casts the tensors among the arguments and leaves objects that it does not know alone, so that
# a batch works in bf16-mixed if it works in 32-true.
# Seen: with 32-true the frozen dataclass arrives as it is. With bf16-mixed, bf16-true and 64-true the call raises
# ValueError ("A frozen dataclass was passed to `apply_to_collection` but this is not allowed.") before forward runs. A
# dataclass that is not frozen arrives as another object whose floating-point tensors have the precision's type, so that
# what forward stores in it is lost to the caller; one's own class arrives itself, its tensors in float32.
# Way out: hand tensors over one by one, or in a class of one's own that is no dataclass; test in the precision of training.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'lightning==2.6.6' 'numpy>=1.26'
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import dataclasses
import sys

import lightning
import torch
from lightning.fabric import Fabric


@dataclasses.dataclass(frozen=True)
class Frozen:
    weights: torch.Tensor


@dataclasses.dataclass
class Plain:
    weights: torch.Tensor


class Own:
    def __init__(self, weights):
        self.weights = weights


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, batch):
        self.arrived = batch
        return (self.scale * batch.weights).sum()


def outcome(precision, kind):
    model, given = Model(), kind(torch.ones(2))
    call = Fabric(accelerator="cpu", devices=1, precision=precision).setup(model)
    try:
        call(given)
    except ValueError as error:
        return f"ValueError: {error}"
    same = "itself" if model.arrived is given else "a copy"
    return f"{same}, {str(model.arrived.weights.dtype).removeprefix('torch.')}"


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
expected = {
    "32-true": {Frozen: "itself, float32", Plain: "itself, float32", Own: "itself, float32"},
    "bf16-mixed": {Frozen: "ValueError: A frozen dataclass", Plain: "a copy, bfloat16", Own: "itself, float32"},
    "bf16-true": {Frozen: "ValueError: A frozen dataclass", Plain: "a copy, bfloat16", Own: "itself, float32"},
    "64-true": {Frozen: "ValueError: A frozen dataclass", Plain: "a copy, float64", Own: "itself, float32"},
}
changed = []
for precision, kinds in expected.items():
    for kind, start in kinds.items():
        found = outcome(precision, kind)
        print(f"{precision} {kind.__name__}: {found}")
        if not found.startswith(start):
            changed.append(f"{precision} {kind.__name__}")
if changed:
    sys.exit(f"changed since lightning 2.6.6: {', '.join(changed)}")
PYTHON
