"""Search keys exactly, without an index file, and check the result against brute force.

Keys may be a memory-mapped array that is larger than RAM: they are read block by block, once for all queries.
"""

import tempfile

import numpy as np
import torch

from fairseq.memory import ExactIndex, Metric

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    keys = np.memmap(f"{folder}/keys.npy", np.float16, "w+", shape=(20_000, 64))
    keys[:] = torch.randn(20_000, 64).numpy()
    queries = torch.randn(100, 64)

    found = ExactIndex(keys, Metric.L2).search(queries, k=10)

    distances = torch.cdist(queries, torch.from_numpy(keys.astype(np.float32)))
    nearest = distances.topk(10, largest=False).indices
    del keys  # close the map before its folder is removed

print(f"nearest rows of query 0: {found.ids_NK[0, :3].tolist()}, scores {found.scores_NK[0, :3].tolist()}")
print(f"equal to brute force: {(found.ids_NK == nearest).float().mean():.1%}")
