"""An exponential moving average of a model's weights, kept in float32 beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fairseq.optim.configs import EmaConfig


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after each update; a copy before ``--ema-start-update``.

    Weights that are not trained, and buffers, are copied.
    """

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self.config = config
        self.weights = {name: _own_copy(value) for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        """Take in the weights after so many updates."""
        if num_updates % self.config.ema_update_freq:
            return
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        copies = num_updates < self.config.ema_start_update
        for name, value in model.state_dict().items():
            if copies or name not in trained:
                self.weights[name].copy_(value)
            else:
                self.weights[name].lerp_(value.to(self.weights[name].dtype), 1 - self.config.ema_decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from stored averages. Raises: ValueError when they are another model's."""
        if weights.keys() != self.weights.keys():
            name = sorted(weights.keys() ^ self.weights.keys())[0]
            raise ValueError(f"the stored average of weights differs from the model in {name}; leave out --store-ema")
        for name, value in weights.items():
            self.weights[name].copy_(value)


def _own_copy(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
