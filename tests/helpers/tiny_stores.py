"""Stores of random text read by tiny models, and the mixture with them by the published formula."""

from __future__ import annotations

import numpy as np
from tiny_models import inputs

from fairseq.hf.knn.saver import KNNSaver

K = 8


def saved(model, folder, name=None, batches=4, **more):
    """A store of random text read by the model, saved call by call."""
    saver = KNNSaver(dstore_dir=folder, dtype="float32", name=name, **more)
    with saver(model):
        for seed in range(batches):
            model(**inputs(model, batch=4, length=12, seed=10 + seed))
    return saver.prefix


def by_hand(logits, key, store, weight, k=K):
    """log((1 - w) p_lm + w p_knn) of every token, in float64, one position after the other.

    Returns as well whether the k-th neighbour of a position is nearer than the next one by more than rounding.
    """
    keys, values = np.asarray(store.keys).astype(np.float64), np.asarray(store.values).astype(int)
    out, is_clear = np.empty(logits.shape), np.empty(len(logits), bool)
    for n, (row, query) in enumerate(zip(logits.double().numpy(), key.double().numpy())):
        score = -((keys - query) ** 2).sum(1)
        order = np.argsort(-score, kind="stable")
        near, is_clear[n] = order[:k], score[order[k - 1]] - score[order[k]] > 1e-6 * abs(score[order[k]])
        share = np.exp(score[near] - score[near].max())
        knn = np.bincount(values[near], share / share.sum(), minlength=len(row))
        lm = np.exp(row - row.max())
        out[n] = np.log((1 - weight) * lm / lm.sum() + weight * knn)
    return out, is_clear
