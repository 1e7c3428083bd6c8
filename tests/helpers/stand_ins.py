"""Stand-ins for what other programs put around a model."""

import torch


class Around(torch.nn.Module):
    """As peft has it: forward calls the forward of the model inside, generate its generate."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.config = inside, inside.config

    def forward(self, *args, **kwargs):
        return self.inside.forward(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inside.generate(*args, **kwargs)
