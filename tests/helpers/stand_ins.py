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


def fuse_head(model):
    """As trl has it: a ``forward`` over the present one that runs the layers and the output embedding itself."""
    own = model.forward

    def fused(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return own(*args, labels=labels, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        scores = model.lm_head(hidden[:, :-1]).flatten(0, 1)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten())}

    model.forward = fused
