"""Flags of the originals that set nothing here. Each is accepted with one warning that says why.

A value of 0 means the flag is a switch, 1 that it takes a value (which is skipped).
"""

from __future__ import annotations

_FABRIC = "Lightning Fabric decides it"
_LAUNCHER = "torchrun or --distributed-world-size sets it"
_SCALER = "the loss scale is PyTorch's GradScaler's"
_TRAINING = "it belongs to training and changes no evaluation"

COMMON: dict[str, tuple[int, str]] = {
    "--all-gather-list-size": (1, "figures are summed as tensors"),
    "--bucket-cap-mb": (1, _FABRIC),
    "--broadcast-buffers": (0, _FABRIC),
    "--empty-cache-freq": (1, "PyTorch's allocator needs no such help"),
    "--fp16-no-flatten-grads": (0, "gradients are never flattened"),
    "--fp16-scale-window": (1, _SCALER),
    "--fp16-scale-tolerance": (1, _SCALER),
    "--min-loss-scale": (1, _SCALER),
    "--threshold-loss-scale": (1, _SCALER),
    "--dataset-impl": (1, "data is always memory-mapped"),
    "--data-buffer-size": (1, "--num-workers sets how far batches are prepared ahead"),
    "--tokenizer": (1, "text is binarised by preprocess.py as it stands"),
    "--bpe": (1, "text is binarised by preprocess.py as it stands"),
    "--lm-eval": (0, "eval_lm.py always evaluates a language model"),
}

TRAIN: dict[str, tuple[int, str]] = COMMON | {
    "--ddp-backend": (1, _FABRIC),
    "--ddp-comm-hook": (1, _FABRIC),
    "--gradient-as-bucket-view": (0, _FABRIC),
    "--distributed-backend": (1, "NCCL on GPUs and Gloo on CPUs"),
    "--distributed-rank": (1, _LAUNCHER),
    "--distributed-init-method": (1, _LAUNCHER),
    "--distributed-port": (1, _LAUNCHER),
    "--distributed-no-spawn": (0, _LAUNCHER),
    "--distributed-num-procs": (1, _LAUNCHER),
    "--device-id": (1, _LAUNCHER),
    "--local-rank": (1, _LAUNCHER),
    "--heartbeat-timeout": (1, _LAUNCHER),
    "--fix-batches-to-gpus": (0, "batches are shared out by their place in the epoch's order"),
    "--fast-stat-sync": (0, "figures are always summed as tensors"),
    "--fixed-validation-seed": (1, "validation draws no random numbers"),
    "--use-old-adam": (0, "PyTorch's fused AdamW computes the same"),
    "--use-bmuf": (0, "BMUF is not offered"),
    "--character-filters": (1, "character embeddings are not offered"),
    "--character-embedding-dim": (1, "character embeddings are not offered"),
    "--char-embedder-highway-layers": (1, "character embeddings are not offered"),
    "--dist": (1, "the original never read it"),
    "--temp": (1, "the original never read it"),
    "--probe": (1, "training searches no index"),
    "--dstore-size": (1, "training searches no datastore"),
    "--dstore-filename": (1, "training searches no datastore"),
    "--indexfile": (1, "training searches no datastore"),
    "--faiss-metric-type": (1, "training searches no datastore"),
    "--use-faiss-cpu": (0, "training searches no datastore"),
    "--knn-sim-func": (1, "training searches no datastore"),
    "--dstore-fp16": (0, "training searches no datastore"),
    "--no-load-keys": (0, "training searches no datastore"),
    "--move-dstore-to-mem": (0, "training searches no datastore"),
    "--lmbda": (1, "training searches no datastore"),
    "--k": (1, "training searches no datastore"),
}

EVALUATE: dict[str, tuple[int, str]] = COMMON | {
    "--criterion": (1, _TRAINING),
    "--optimizer": (1, _TRAINING),
    "--lr-scheduler": (1, _TRAINING),
    "--arch": (1, "the checkpoint knows its architecture"),
    "--momentum": (1, _TRAINING),
    "--weight-decay": (1, _TRAINING),
    "--lr-shrink": (1, _TRAINING),
    "--warmup-updates": (1, _TRAINING),
    "--force-anneal": (1, _TRAINING),
    "--ddp-backend": (1, _TRAINING),
}

PREPROCESS: dict[str, tuple[int, str]] = {
    name: value for name, value in (COMMON | EVALUATE).items() if name not in ("--dataset-impl", "--arch")
} | {
    "--task": (1, "binarised text is the same for every task"),
    "--cpu": (0, "no model runs"),
    "--fp16": (0, "no model runs"),
    "--memory-efficient-fp16": (0, "no model runs"),
    "--fp16-init-scale": (1, "no model runs"),
    "--seed": (1, "nothing is drawn"),
}
