"""The number of elements of the largest tensor that operations make."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, inputs=(), options=None):
        made = func(*inputs, **options or {})
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return made
