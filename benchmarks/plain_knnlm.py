"""The peer of ``cold_start.py``: kNN-LM as people write it by hand, with faiss, torch and numpy.

It searches batch by batch: ``faiss.read_index``, ``index.search``, tokens of the rows from a memory-mapped file,
logsumexp over those neighbours that hold the target, and the mixture. It uses nothing of fairseq.memory, of the
evaluation or of the data sets; the model's class and the reader of its checkpoint are this project's, so that both
sides have the same weights.

``python plain_knnlm.py DATA CHECKPOINT STORE INDEX SETTINGS`` prints a line of JSON: the loss in nats, the number of
tokens, and the seconds until each phase ended.

Shapes: N scored positions of a batch, B blocks, T positions of a block, K neighbours, R rows of the store.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGAN = time.perf_counter()

if TYPE_CHECKING:
    from collections.abc import Iterator

PAD, EOS, NUM_SPECIAL = 1, 2, 4


def batches(token_N: Any, block: int, context: int, rows: int) -> Iterator[tuple[Any, Any, Any]]:
    """Blocks after their context: inputs (B, T), which of their positions are scored, and the targets (N,)."""
    import numpy as np
    import torch

    stream, begins = np.append(EOS, token_N), np.arange(0, len(token_N), block)
    for begin_B in np.split(begins, range(rows, len(begins), rows)):
        end_B, before_B = np.minimum(begin_B + block, len(token_N)), np.maximum(begin_B - context, 0)
        tokens_BT = np.full((len(begin_B), max(end_B - before_B)), PAD)
        scored_BT = np.zeros(tokens_BT.shape, bool)
        for row, (before, begin, end) in enumerate(zip(before_B, begin_B, end_B)):
            tokens_BT[row, : end - before] = stream[before:end]
            scored_BT[row, begin - before : end - before] = True
        target_N = token_N[begin_B[0] : end_B[-1]]
        yield torch.from_numpy(tokens_BT), torch.from_numpy(scored_BT), torch.from_numpy(target_N)


def main() -> None:
    """Evaluate on valid.bin, and print the loss."""
    import faiss
    import numpy as np
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from fairseq.checkpoint_utils import load_checkpoint, load_model

    data, checkpoint, store, index_file = sys.argv[1:5]
    settings = json.loads(sys.argv[5])
    ended = {"import": time.perf_counter() - BEGAN}
    num_types = len(Path(data, "dict.txt").read_bytes().splitlines()) + NUM_SPECIAL
    token_N = np.fromfile(f"{data}/valid.bin", np.uint16 if num_types < 65500 else np.int32).astype(np.int64)
    model = load_model(load_checkpoint(checkpoint), num_types, PAD).eval().requires_grad_(False)
    ended["model"] = time.perf_counter() - BEGAN
    value_R = np.memmap(f"{store}_vals.npy", json.loads(Path(f"{store}.json").read_text())["value_dtype"], "r")
    index = faiss.read_index(index_file)
    index.nprobe = settings["probe"]
    ended["store and index"] = time.perf_counter() - BEGAN
    share, total, count = settings["lmbda"], 0.0, 0
    sizes = (settings["block"], settings["context"], settings["rows"])
    with torch.inference_mode():
        for tokens_BT, scored_BT, target_N in batches(token_N, *sizes):
            out = model(tokens_BT, key_tap="last_ffn_input")
            logp_N, _ = model.target_logp(out.hidden_BTD[scored_BT], target_N)
            distance_NK, ids_NK = map(torch.from_numpy, index.search(out.key_BTD[scored_BT].numpy(), settings["k"]))
            hit_NK = (torch.from_numpy(value_R[ids_NK.numpy()]) == target_N[:, None]) & (ids_NK >= 0)
            knn_NK = torch.log_softmax(-distance_NK, -1).masked_fill(~hit_NK, -torch.inf)
            mixed_N = torch.logaddexp(logp_N + np.log(1 - share), torch.logsumexp(knn_NK, -1) + np.log(share))
            total, count = total - float(mixed_N.sum()), count + len(target_N)
            ended.setdefault("first batch", time.perf_counter() - BEGAN)
    ended["other batches"] = time.perf_counter() - BEGAN
    sys.stdout.write(json.dumps({"loss": total / count, "tokens": count, "ended": ended}) + "\n")


if __name__ == "__main__":
    main()
