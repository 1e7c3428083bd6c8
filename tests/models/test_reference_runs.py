"""Per-token figures of the original programs, where the folder with them is at hand (``FAIRSEQ_GOLDEN``)."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint, load_model
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

ROOT = os.environ.get("FAIRSEQ_GOLDEN")
pytestmark = pytest.mark.skipif(not ROOT, reason="FAIRSEQ_GOLDEN is not set")
CHECKPOINTS = {
    "trime/ckpt/vanilla.pt": 17552,
    "trime/ckpt/trime.pt": 17552,
    "fairseq012/ckpt/lm/checkpoint_best.pt": 8144,
}


def score(model, tokens, block, context):
    source = torch.cat([torch.tensor([2]), tokens[:-1]])
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), block):
            stop, first = min(start + block, len(tokens)), max(0, start - context)
            hidden = model(source[None, first:stop]).hidden_BTD[0, start - first :]
            parts.append(model.target_logp(hidden, tokens[start:stop])[0])
    return torch.cat(parts)


def model_of(name):
    return load_model(load_checkpoint(str(Path(ROOT, name))), CHECKPOINTS[name], 1).eval()


def test_every_token_of_a_trime_evaluation():
    stored = torch.load(Path(ROOT, "trime/scores/plain_vanilla_none.pt"), weights_only=True)
    ours = score(model_of("trime/ckpt/vanilla.pt"), stored["tokens"].long(), block=64, context=192)
    torch.testing.assert_close(ours, stored["scores"], atol=1e-4, rtol=0)


def test_perplexity_of_a_version_0_12_model():
    tokens = torch.from_numpy(np.fromfile(Path(ROOT, "fairseq012/data-bin/lm/valid.bin"), np.uint16).astype(np.int64))
    mean = score(model_of("fairseq012/ckpt/lm/checkpoint_best.pt"), tokens, block=64, context=0).double().mean()
    assert round(-mean.item() / math.log(2), 4) == 10.4255
    assert math.exp(-mean) == pytest.approx(1375.31, abs=0.005)


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_state_dicts_load_as_they_are(name):
    state = load_checkpoint(str(Path(ROOT, name))).model
    model = model_of(name)
    model.load_state_dict(state)
    assert state.keys() <= model.state_dict().keys()
    assert all(key.endswith("_float_tensor") for key in model.state_dict().keys() - state.keys())


def test_loss_and_gradient_of_an_adaptive_softmax():
    case = torch.load(Path(ROOT, "trime/criterion/b4x64.pt"), weights_only=True)
    stored = torch.load(Path(ROOT, "trime/criterion/adaptive_softmax_state.pt"), weights_only=True)
    embed = AdaptiveInput(17552, 1, 128, 4, 128, (2000, 8000))
    softmax = AdaptiveSoftmax(17552, 128, (2000, 8000), adaptive_input=embed, tie_proj=True)
    both = torch.nn.ModuleDict({"embed_tokens": embed, "adaptive_softmax": softmax})
    both.load_state_dict({k.removeprefix("decoder."): v for k, v in stored["adaptive_softmax_state"].items()})
    x = case["x"].clone().requires_grad_()
    loss = -softmax.target_logp(x.flatten(0, 1), case["target"].flatten())[0].sum()
    loss.backward()
    expected = case["results"]["adaptive_loss"]
    assert loss.item() == pytest.approx(expected["loss_sum_nats"].item(), rel=1e-5)
    scale = expected["grad_x"].abs().max().item()
    torch.testing.assert_close(x.grad, expected["grad_x"], atol=1e-4 * scale, rtol=1e-4)
    for name, gradient in expected["grad_softmax_params"].items():
        ours = both.get_parameter(name.removeprefix("decoder.")).grad
        torch.testing.assert_close(ours, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-4)
