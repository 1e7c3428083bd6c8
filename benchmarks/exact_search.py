"""Exact search over faiss's IndexFlat, queries/s, at recall 1; and the peak memory with ever more keys."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

WANTED = ">= 1.5 on AVX2, 4 on VNNI, 8 on AMX"
_CENTERS = 2000


def make_keys(path: Path, rows: int, dim: int, seed: int) -> np.ndarray[Any, Any]:
    """Rows in loose clusters, as hidden states are, written in pieces and memory-mapped."""
    centers = np.random.default_rng(0).standard_normal((_CENTERS, dim)).astype(np.float32)
    keys = np.memmap(path, dtype=np.float32, mode="w+", shape=(rows, dim))
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 16384):
        count = min(16384, rows - start)
        part = centers[rng.integers(0, _CENTERS, count)]
        keys[start : start + count] = part + rng.standard_normal((count, dim), dtype=np.float32)
    keys.flush()
    return np.memmap(path, dtype=np.float32, mode="r", shape=(rows, dim))


def queries_of(count: int, dim: int, folder: Path) -> Any:
    """Queries of the keys' kind."""
    import torch

    return torch.from_numpy(np.array(make_keys(folder / "queries", count, dim, 1)))


def search_once(path: str, rows: int, options: Any) -> None:
    """Search a store of that many rows and print the peak memory that is not the mapped file's."""
    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.types import Metric

    keys = np.memmap(path, dtype=np.float32, mode="r", shape=(rows, options.dim))
    with tempfile.TemporaryDirectory() as folder:
        query_ND = queries_of(options.queries, options.dim, Path(folder))
    ExactIndex(keys, Metric(options.metric)).search(query_ND, options.k)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    held = {name: int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmHWM", "RssFile")}
    sys.stdout.write(f"{held['VmHWM'] - held['RssFile']}\n")


def main() -> None:
    """Search with both, in turn; then with more keys."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2")
    parser.add_argument(
        "--more-rows", type=int, nargs="*", default=[], help="sizes for time and memory (8 GB a million)"
    )
    parser.add_argument("--search", nargs=2, metavar=("FILE", "ROWS"), help="search once and print the peak memory")
    options = parser.parse_args()
    if options.search:
        search_once(options.search[0], int(options.search[1]), options)
        return
    with tempfile.TemporaryDirectory() as made:
        details = compare(options, Path(made))
        details["more"] = [scale(options, rows, Path(made)) for rows in options.more_rows]
    ratio = common.median_ratio(details["faiss_seconds"], details["seconds"])
    name = f"queries/s over IndexFlat's, {options.metric}, recall {details['recall']:.6f}"
    common.tell("exact_search", name, ratio, WANTED, details, options.out)


def compare(options: Any, folder: Path) -> dict[str, Any]:
    """Seconds of both and the share of neighbours found."""
    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.index.faiss.builder import FaissBuilder
    from fairseq.memory.index.faiss.index import FaissIndex
    from fairseq.memory.types import Metric

    keys = make_keys(folder / "keys", options.rows, options.dim, 0)
    query_ND = queries_of(options.queries, options.dim, folder)
    ours = ExactIndex(keys, Metric(options.metric))
    builder = FaissBuilder.new("Flat", options.dim, ours.metric, seed=1)
    builder.add_codes(builder.encode(keys))
    builder.save(folder / f"flat.{options.metric}")
    flat = FaissIndex.open(folder / f"flat.{options.metric}", ours.metric).inner
    del builder
    found = ours.search(query_ND, options.k)
    scores = flat.search(query_ND.numpy(), options.k)[0]
    scores = -scores if options.metric == "l2" else scores
    # By scores: of keys that are equally close to the last bit, either may be found.
    slack = 1e-5 * np.abs(scores).max()
    recall = float((found.scores_NK.numpy() >= scores[:, -1:] - slack).mean())
    seconds, faiss_seconds = common.in_turn(
        lambda: ours.search(query_ND, options.k), lambda: flat.search(query_ND.numpy(), options.k), options.repeats
    )
    sizes = {name: getattr(options, name) for name in ("rows", "dim", "queries", "k")}
    return sizes | {"recall": recall, "seconds": seconds, "faiss_seconds": faiss_seconds}


def scale(options: Any, rows: int, folder: Path) -> dict[str, Any]:
    """Time and peak memory of one search among that many keys."""
    path = folder / "more"
    make_keys(path, rows, options.dim, 0)
    words = [sys.executable, __file__, "--search", str(path), str(rows), "--dim", str(options.dim)]
    words += ["--queries", str(options.queries), "--k", str(options.k), "--metric", options.metric]
    done: list[int] = []
    seconds = common.seconds(
        lambda: done.append(int(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    )
    os.remove(path)
    sys.stdout.write(f"  {rows} keys: {seconds:.1f} s with start-up, peak {done[0] / 2**20:.0f} MiB\n")
    return {"rows": rows, "seconds": seconds, "peak": done[0]}


if __name__ == "__main__":
    main()
