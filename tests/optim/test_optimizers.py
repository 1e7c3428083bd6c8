"""Optimizers against the published recursions, written out in NumPy float64."""

import io

import numpy as np
import pytest
import torch

from fairseq.config import FlagParser, build
from fairseq.optim import OPTIMIZERS, configs, set_lr
from fairseq.optim.optimizers import build_optimizer

RATES = [0.1, 0.1, 0.03, 0.2, 0.0, 0.05, 0.05, 0.01]


def gradients(shape, count):
    generator = np.random.default_rng(7)
    return [generator.normal(size=shape) for _ in range(count)]


def run(name, start, rates=RATES, **given):
    """Parameters after each update of the project's optimizer."""
    param = torch.nn.Parameter(torch.tensor(start))
    optimizer = build_optimizer(name, [param], given, lr=rates[0])
    seen = []
    for lr, grad in zip(rates, gradients(start.shape, len(rates))):
        set_lr(optimizer, lr)
        param.grad = torch.tensor(grad)
        optimizer.step()
        seen.append(param.detach().numpy().copy())
    return seen


@pytest.fixture
def start():
    return np.random.default_rng(1).normal(size=(4, 3))


def test_adam_is_the_published_algorithm_with_decoupled_decay(start):
    beta1, beta2, eps, decay = 0.9, 0.98, 1e-8, 0.1
    x, mean, square = start.copy(), 0.0, 0.0
    ours = run("adam", start, adam_betas=(beta1, beta2), adam_eps=eps, weight_decay=decay)
    for t, (lr, grad) in enumerate(zip(RATES, gradients(start.shape, len(RATES))), start=1):
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        step = (mean / (1 - beta1**t)) / (np.sqrt(square / (1 - beta2**t)) + eps)
        x = x - lr * decay * x - lr * step
        np.testing.assert_allclose(ours[t - 1], x, rtol=1e-10)


def test_adamax_is_the_published_algorithm_with_decoupled_decay(start):
    beta1, beta2, decay = 0.9, 0.98, 0.1
    x, mean, largest = start.copy(), 0.0, np.zeros_like(start)
    ours = run("adamax", start, adamax_betas=(beta1, beta2), adamax_eps=0.0, weight_decay=decay)
    for t, (lr, grad) in enumerate(zip(RATES, gradients(start.shape, len(RATES))), start=1):
        mean = beta1 * mean + (1 - beta1) * grad
        largest = np.maximum(beta2 * largest, abs(grad))
        x = x - lr * decay * x - lr / (1 - beta1**t) * mean / largest
        np.testing.assert_allclose(ours[t - 1], x, rtol=1e-10)


def test_adagrad_and_adadelta_are_the_published_algorithms(start):
    rho, eps = 0.9, 1e-6
    x, total = start.copy(), 0.0
    y, square, steps = start.copy(), 0.0, 0.0
    adagrad, adadelta = run("adagrad", start), run("adadelta", start, adadelta_rho=rho, adadelta_eps=eps)
    for t, (lr, grad) in enumerate(zip(RATES, gradients(start.shape, len(RATES)))):
        total = total + grad**2
        x = x - lr * grad / (np.sqrt(total) + 1e-10)
        np.testing.assert_allclose(adagrad[t], x, rtol=1e-8)
        square = rho * square + (1 - rho) * grad**2
        step = np.sqrt(steps + eps) / np.sqrt(square + eps) * grad
        steps = rho * steps + (1 - rho) * step**2
        y = y - lr * step
        np.testing.assert_allclose(adadelta[t], y, rtol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_nag_is_the_published_recursion_with_the_velocity_rescaled_to_each_rate(start, decay):
    # arXiv 1212.0901, eq. 7: v' = m v - lr g, x' = x + m^2 v - (1 + m) lr g. When the rate changes, v is scaled by
    # lr / previous lr. A rate of 0 leaves no velocity to scale, so it is left out here and tested below.
    momentum, rates = 0.99, [lr for lr in RATES if lr > 0]
    x, velocity, previous = start.copy(), 0.0, rates[0]
    ours = run("nag", start, rates, momentum=momentum, weight_decay=decay)
    for i, (lr, grad) in enumerate(zip(rates, gradients(start.shape, len(rates)))):
        velocity = velocity * (lr / previous)
        x = x * (1 - lr * decay) + momentum**2 * velocity - (1 + momentum) * lr * grad
        velocity, previous = momentum * velocity - lr * grad, lr
        np.testing.assert_allclose(ours[i], x, rtol=1e-10)


def test_nag_stands_still_at_rate_zero_and_goes_on_afterwards(start):
    ours = run("nag", start, momentum=0.9)
    zero = RATES.index(0.0)
    np.testing.assert_array_equal(ours[zero], ours[zero - 1])
    assert np.isfinite(ours[-1]).all()
    assert (ours[-1] != ours[zero]).all()


def test_nag_leaves_weights_without_a_gradient_alone():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer("nag", [used, unused], {"weight_decay": 0.5}, lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))


def test_sgd_adds_the_decay_to_the_gradient(start):
    momentum, decay = 0.9, 0.3
    x, velocity = start.copy(), 0.0
    ours = run("sgd", start, momentum=momentum, weight_decay=decay)
    for i, (lr, grad) in enumerate(zip(RATES, gradients(start.shape, len(RATES)))):
        velocity = momentum * velocity + grad + decay * x
        x = x - lr * velocity
        np.testing.assert_allclose(ours[i], x, rtol=1e-10)


def rms(array):
    return np.sqrt(np.mean(array**2))


def published_adafactor(start, config, rates):
    """arXiv 1804.04235, algorithms 4 (matrices) and 5 (vectors), in the paper's sums."""
    (eps1, eps2), x, mean = config.adafactor_eps, start.copy(), 0.0
    row = column = square = 0.0
    for t, (lr, grad) in enumerate(zip(rates, gradients(start.shape, len(rates))), start=1):
        keep = 1 - t**config.decay_rate
        if start.ndim >= 2:
            row = keep * row + (1 - keep) * (grad**2 + eps1).sum(-1, keepdims=True)
            column = keep * column + (1 - keep) * (grad**2 + eps1).sum(-2, keepdims=True)
            second = row * column / row.sum(-2, keepdims=True)
        else:
            second = square = keep * square + (1 - keep) * (grad**2 + eps1)
        update = grad / np.sqrt(second)
        update = update / max(1.0, rms(update) / config.clip_threshold)
        step = lr
        if config.relative_step:
            step = min(1e-6 * t if config.warmup_init else 1e-2, 1 / np.sqrt(t))
        if config.scale_parameter:
            step = step * max(eps2, rms(x))
        update = step * update
        if config.beta1 is not None:
            update = mean = config.beta1 * mean + (1 - config.beta1) * update
        x = x - config.weight_decay * step * x - update
        yield x


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 4, 3)])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scale_parameter": True, "weight_decay": 0.1},
        {"scale_parameter": True, "relative_step": True},
        {"scale_parameter": True, "relative_step": True, "warmup_init": True},
        {"beta1": 0.9, "decay_rate": -0.5, "clip_threshold": 0.5, "weight_decay": 0.1},
    ],
)
def test_adafactor_is_the_published_algorithm(shape, given):
    start = np.random.default_rng(2).normal(size=shape)
    expected = list(published_adafactor(start, build(configs.AdafactorConfig, given), RATES))
    for ours, theirs in zip(run("adafactor", start, **given), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    param = torch.nn.Parameter(torch.ones(40, 30))
    optimizer = build_optimizer("adafactor", [param], {}, lr=0.1)
    param.grad = torch.ones(40, 30)
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
    assert kept == 40 + 30


def test_adafactor_updates_half_precision_weights_by_float32_moments():
    param = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float16))
    optimizer = build_optimizer("adafactor", [param], {}, lr=0.1)
    param.grad = torch.full((4, 3), 1e-5, dtype=torch.float16)  # its square is 0 in float16
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4, 3), 0.9, dtype=torch.float16))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_stored_state_goes_on_bit_for_bit(name):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        return layer, build_optimizer(name, layer.parameters(), {"momentum": 0.9}, lr=0.05)

    def train(layer, optimizer, updates):
        for update in updates:
            inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(update))
            optimizer.zero_grad()
            layer(inputs).square().sum().backward()
            optimizer.step()

    layer, optimizer = make()
    train(layer, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(layer, optimizer, range(3, 6))

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    again, resumed = make()
    again.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    train(again, resumed, range(3, 6))
    assert torch.equal(layer.weight, again.weight)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_frozen_weights_are_left_out(name):
    layer = torch.nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    optimizer = build_optimizer(name, layer.parameters(), {}, lr=0.05)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(3, 4)]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_gradients_are_clipped_under_a_loss_scale_as_without(name):
    # Fabric refuses to clip for optimizers that undo the loss scale within their step.
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=128)
    weights = []
    for plugins in (None, [MixedPrecision("16-mixed", "cpu", scaler=scaler)]):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        entry = OPTIMIZERS[name]
        model, optimizer = fabric.setup(layer, entry.load()(list(layer.parameters()), entry.config(), 0.1))
        for _ in range(3):
            optimizer.zero_grad()
            fabric.backward(model(torch.ones(2, 4)).float().square().sum())
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def test_flags_are_read_as_literals():
    parser = FlagParser("train.py", "")
    parser.add_config(configs.AdamConfig)
    parser.add_config(configs.AdafactorConfig)
    given = parser.parse(
        ["--adam-betas", "(0.9, 0.98)", "--adafactor-eps", "(1e-20, 1e-2)", "--decay-rate", "-0.7", "--wd", "0.1"]
    )
    adam, adafactor = build(configs.AdamConfig, given), build(configs.AdafactorConfig, given)
    assert (adam.adam_betas, adam.weight_decay) == ((0.9, 0.98), 0.1)
    assert (adafactor.adafactor_eps, adafactor.decay_rate, adafactor.beta1) == ((1e-20, 1e-2), -0.7, None)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("adma", {}, "did you mean 'adamax'"),
        ("adam", {"adam_betas": (0.9,)}, "--adam-betas needs two numbers"),
        ("adam", {"adam_betas": (0.9, 1.0)}, r"--adam-betas must lie in \[0, 1\)"),
        ("adam", {"weight_decay": -1.0}, "--weight-decay must be at least 0, got -1.0"),
        ("nag", {"momentum": -0.1}, "--momentum must be at least 0"),
        ("adafactor", {"warmup_init": True}, "--warmup-init needs --relative-step"),
        ("adafactor", {"clip_threshold": 0.0}, "--clip-threshold must be above 0"),
        ("adafactor", {"decay_rate": 0.8}, "--decay-rate is an exponent"),
        ("adafactor", {"beta1": 1.0}, r"--beta1 must lie in \[0, 1\)"),
    ],
)
def test_mistakes_are_told(name, given, said):
    with pytest.raises(ValueError, match=said):
        build_optimizer(name, [torch.nn.Parameter(torch.ones(2))], given, lr=0.1)
