"""``fairseq.distributed_utils``: which process this is. Processes are joined by Lightning Fabric."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def _runs() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank(group: Any = None) -> int:
    """Number of this process; 0 where there is one."""
    return dist.get_rank(group) if _runs() else 0


def get_world_size(group: Any = None) -> int:
    """Number of processes."""
    return dist.get_world_size(group) if _runs() else 1


get_global_rank = get_data_parallel_rank = get_rank
get_global_world_size = get_data_parallel_world_size = get_world_size


def is_master(settings: Any = None) -> bool:
    """True in the first process."""
    return get_rank() == 0


def all_reduce(tensor: Any, group: Any = None, op: str = "sum") -> Any:
    """The sum (or ``"max"``) of a tensor over processes, in place."""
    if _runs():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return tensor
