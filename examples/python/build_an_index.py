"""Build a faiss index over a datastore, search it, and compare it with exact search.

``ivfsq8`` keeps a byte per column and searches some of its lists. ``ivfpq``, the default, keeps fewer bytes and takes
longer to train. Call ``build_index`` again with the same config to resume an interrupted build.
"""

import tempfile

import torch

from fairseq.memory import BuildConfig, DatastoreWriter, ExternalMemory, build_index

torch.manual_seed(0)
centers = torch.randn(50, 64)  # keys in groups, like those of a language model
keys = centers[torch.randint(0, 50, (20_000,))] + 0.3 * torch.randn(20_000, 64)
queries = keys[:200] + 0.1 * torch.randn(200, 64)

with tempfile.TemporaryDirectory() as folder:
    store, index = f"{folder}/store", f"{folder}/store.index"
    with DatastoreWriter(store, *keys.shape) as writer:
        writer.append(keys, torch.randint(0, 100, (20_000,)))
        writer.finish()

    config = BuildConfig(dstore_mmap=store, faiss_index=index, index="ivfsq8", ncentroids=32, no_report=True)
    built = build_index(config)
    print(f"{config.factory(64)}: {built.bytes / built.rows:.0f} bytes per key; the keys take {4 * 64}")

    exact = ExternalMemory.open(store, k=10).neighbors(queries)
    for probe in (1, 4, 16):
        found = ExternalMemory.open(store, index, k=10, probe=probe).neighbors(queries)
        recall = (found.ids_NK[:, :, None] == exact.ids_NK[:, None, :]).any(2).float().mean()
        print(f"probe {probe:2}: recall@10 {recall:.3f}")
