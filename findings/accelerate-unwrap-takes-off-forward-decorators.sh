#!/usr/bin/env bash
# accelerate 1.15.0 with transformers 5.24.0 (CPU): unwrap_model(keep_fp32_wrapper=False) of a model that was prepared in
# half precision takes off more than accelerate put on: transformers' own decorators of forward go as well.
#
# Guess: after prepare and unwrap_model(keep_fp32_wrapper=False) the model is as it was before prepare.
# Seen: forward is followed through __wrapped__ to its end, because the bound method that accelerate kept
# (_original_forward) never equals the function it looks for. What is left is the undecorated function of the class:
# model(ids, return_dict=False), which gave a tuple before, raises AttributeError ('tuple' object has no attribute
# 'last_hidden_state'). A forward that was replaced by a functools.partial is found, but is then bound to the model once
# more: model(ids) gives the model as input_ids (TypeError), and inspect.signature lacks input_ids.
# Way out: unwrap_model(model), whose default keeps the wrapper, or torch.autocast around the calls in place of prepare;
# and put a wrapper of forward on after unwrapping.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==5.24.0' \
  'accelerate==1.15.0' 'numpy>=1.26'
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import functools
import inspect
import sys

import accelerate
import torch
import transformers


def outcome(call):
    try:
        return type(call()).__name__
    except (AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def fresh():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()


accelerator, ids = accelerate.Accelerator(cpu=True, mixed_precision="bf16"), torch.tensor([[1, 2, 3]])
model, seen = fresh(), {}
seen["as made, return_dict=False"] = outcome(lambda: model(ids, return_dict=False))
model = accelerator.prepare(model)
seen["prepared, return_dict=False"] = outcome(lambda: model(ids, return_dict=False))
model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
seen["unwrapped, return_dict=False"] = outcome(lambda: model(ids, return_dict=False))
model = fresh()
model.forward = functools.partial(model.forward)
model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
seen["partial, unwrapped"] = outcome(lambda: model(ids))
seen["partial, unwrapped: first parameter"] = next(iter(inspect.signature(model.forward).parameters))
print(f"accelerate {accelerate.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
for what, found in seen.items():
    print(f"{what}: {found}")
expected = ["tuple", "tuple", "AttributeError", "TypeError", "attention_mask"]
changed = [what for (what, found), start in zip(seen.items(), expected) if not found.startswith(start)]
if changed:
    sys.exit(f"changed since accelerate 1.15.0: {'; '.join(changed)}")
PYTHON
