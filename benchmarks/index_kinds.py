"""Every kind of index against plain faiss with the same parameters: recall within 0.01, building no slower."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

_CENTERS = 2000


def main() -> None:
    """Build each kind with both, in turn; print the worst ratio of the times and the worst difference in recall."""
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.index import INDEXES

    parser = common.parser(__doc__, "store")
    parser.add_argument("--kinds", nargs="*", default=[*INDEXES])
    parser.add_argument("--dist", choices=("l2", "ip", "cos"), default="l2")
    parser.add_argument("--rows", type=int, default=131_072, help="of made-up keys, without --store")
    parser.add_argument("--dim", type=int, default=128, help="of made-up keys, without --store")
    parser.add_argument("--ncentroids", type=int, default=512)
    parser.add_argument("--code-size", type=int, default=32)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--probes", type=int, nargs="*", default=[8, 32])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prefix = options.store or str(folder / "dstore")
        if not options.store:
            make_store(folder / "dstore", options.rows, options.dim)
        store = Datastore.open(prefix)
        compiled = (
            "from fairseq.memory.index.kmeans.kmeans import kmeans; import torch; kmeans(torch.rand(99, 8), 9, seed=1)"
        )
        common.run("-c", compiled)  # once per installation
        lines = [compare(kind, prefix, store, folder, options) for kind in options.kinds]
    worst = max(line["ratio"] for line in lines)
    lost = max(line["recall_lost"] for line in lines)
    what = f"building over plain faiss's time, the slowest kind; recall@{options.k} at most {lost:.4f} lower"
    sizes = {name: getattr(options, name) for name in ("ncentroids", "code_size", "dist", "k", "queries")}
    sizes |= {"rows": len(store), "dim": store.dim}
    common.tell("index_kinds", what, worst, "<= 1, at most 0.01", sizes | {"kinds": lines}, options.out)


def make_store(prefix: Path, rows: int, dim: int) -> None:
    """Keys in loose clusters, as hidden states are."""
    from fairseq.memory.datastore.writer import DatastoreWriter

    centers = np.random.default_rng(0).standard_normal((_CENTERS, dim)).astype(np.float32)
    draw = np.random.default_rng(1)
    with DatastoreWriter(prefix, rows, dim, "float16") as writer:
        for start in range(0, rows, 16384):
            count = min(16384, rows - start)
            part = centers[draw.integers(0, _CENTERS, count)] + draw.standard_normal((count, dim), dtype=np.float32)
            writer.append(part, np.zeros(count, np.int64))
        writer.finish()


def compare(kind: str, prefix: str, store: Any, folder: Path, options: Any) -> dict[str, Any]:
    """One kind: seconds of both, what both find, and what ours takes."""
    import torch

    from fairseq.memory.index.build.build import build_index
    from fairseq.memory.index.build.config import BuildConfig

    sizes = {"ncentroids": options.ncentroids, "code_size": options.code_size, "dist": options.dist}
    sizes["graph_threads"] = torch.get_num_threads()  # as many as plain faiss takes
    config = BuildConfig(dstore_mmap=prefix, faiss_index=str(folder / "ours"), index=kind, use_faiss_cpu=True, **sizes)
    ours, plain, found = [], [], {}
    for _ in range(options.repeats):
        for path in folder.glob("ours*"):
            path.unlink()
        started = time.perf_counter()
        built = build_index(config)
        ours.append(time.perf_counter() - started)
        plain.append(common.seconds(lambda: build_plainly(config, store, folder / "plain")))
        sys.stdout.write(f"  {kind}: {ours[-1]:.1f} s, plain faiss {plain[-1]:.1f} s\n")
    for name, path in (("ours", built.path), ("plain", folder / "plain")):
        found[name] = measure(path, config, store, options)
    lost = max(b["recall"] - a["recall"] for a, b in zip(found["ours"], found["plain"]))
    line = {"kind": kind, "factory": config.factory(store.dim), "seconds": ours, "plain_seconds": plain, **found}
    line |= {"ratio": common.median_ratio(ours, plain), "recall_lost": lost, "bytes_per_key": built.bytes / len(store)}
    told = ", ".join(f"probe {a['probe']} {a['recall']:.4f} ({b['recall']:.4f})" for a, b in zip(*found.values()))
    rates = ", ".join(f"{a['queries_per_second']:.0f}" for a in found["ours"])
    sys.stdout.write(
        f"  {kind}: {line['ratio']:.2f} of faiss's time; {line['bytes_per_key']:.1f} bytes per key, "
        f"{statistics.median(ours):.1f} s; recall (faiss's) {told}; queries/s {rates}\n"
    )
    return line


def build_plainly(config: Any, store: Any, path: Path) -> None:
    """What a few lines with faiss do: the same factory string, seed and sample."""
    from fairseq.memory.datastore.chunked_array import as_tensor
    from fairseq.memory.index.build.build import training_rows
    from fairseq.memory.index.faiss_library import faiss_library
    from fairseq.memory.similarity import normalized

    faiss = faiss_library()
    measure = faiss.METRIC_L2 if config.dist == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(store.dim, config.factory(store.dim), measure)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.cp.seed = config.seed
    prepare = (lambda x: normalized(as_tensor(x)).numpy()) if config.dist == "cos" else (lambda x: x)
    if not index.is_trained:
        sample = training_rows(config, store, lists.nlist if lists is not None else 0)
        index.train(prepare(store.take_keys(sample)))
    for start in range(0, len(store), config.num_keys_to_add_at_a_time):
        block = store.keys.block(start, start + config.num_keys_to_add_at_a_time).float().numpy()
        index.add(prepare(block))
    faiss.write_index(index, str(path))
    with open(path, "rb+") as file:  # as ours is: on the disk for sure
        os.fsync(file.fileno())


def measure(path: Path, config: Any, store: Any, options: Any) -> list[dict[str, Any]]:
    """What an index finds and how fast."""
    import torch

    from fairseq.memory.index.build.quality import measured
    from fairseq.memory.index.faiss.index import FaissIndex
    from fairseq.memory.types import Metric

    rows = np.random.default_rng(3).choice(len(store), options.queries, replace=False)
    index = FaissIndex.open(path, Metric(config.dist))
    return measured(index, store, torch.from_numpy(np.sort(rows)), options.k, options.probes)


if __name__ == "__main__":
    main()
