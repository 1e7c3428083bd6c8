"""Search by Ray actors against search in one process: queries/s, efficiency, start-up, memory, and a cost model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

WANTED = 0.9
WANTED_EFFICIENCY, WANTED_ERROR = 0.8, 0.15
_MILLION = 1 << 20
_FITTED_ROWS, _HELD_OUT_ROWS = (_MILLION // 4, _MILLION, 4 * _MILLION), 8 * _MILLION
_SHARDS = (1, 2, 4)
_BASE_ROWS = 1 << 17
_READY = "describe"


def make_keys(path: Path, rows: int, dim: int) -> None:
    """Random float16 keys: one block, its columns shuffled and their signs changed for each further block."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((min(rows, _BASE_ROWS), dim), dtype=np.float32).astype(np.float16)
    with open(path, "wb") as file:
        for start in range(0, rows, len(base)):
            signs = rng.integers(0, 2, dim, np.uint16) << 15  # xor on bits: NumPy multiplies float16 in software
            block = base.view(np.uint16)[: rows - start, rng.permutation(dim)] ^ signs
            file.write(block.tobytes())


def make_ranges(options: Any, rows: int, count: int) -> list[Any]:
    """The first rows of the file in so many ranges."""
    from fairseq.memory.index.sharded.ranges import KeyFile, RowRange, SearchSettings

    edges = [rows * at // count for at in range(count + 1)]
    ranges = []
    for first, past in zip(edges, edges[1:]):
        file = KeyFile(options.keys, 0, rows, first, past, None, None)
        deleted = np.empty(0, np.int64)
        ranges.append(RowRange(first, past - first, options.dim, "float16", (file,), deleted, SearchSettings()))
    return ranges


def make_queries(options: Any) -> Any:
    """Random queries."""
    import torch

    return torch.randn(options.queries, options.dim, generator=torch.Generator().manual_seed(1))


class First:
    """Only the first of several workers."""

    def __init__(self, workers: Any) -> None:
        self._workers = workers

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)


def open_actors(options: Any, rows: int, count: int) -> tuple[Any, Any]:
    """Index and actors; on two cores two actors have a thread each."""
    from fairseq.memory.index.sharded.index import ShardedIndex
    from fairseq.memory.index.sharded.server import RangeServer
    from fairseq.runtime.ray_cluster import RayActors

    ranges = make_ranges(options, rows, count)
    actors = RayActors.start(RangeServer, ranges, [each.paths for each in ranges], _READY)
    return ShardedIndex(actors, rows), actors


def compare(options: Any) -> dict[str, Any]:
    """Seconds of actors and of one process, in turn; bit-identical results are a condition."""
    import torch

    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.index.sharded.index import ShardedIndex
    from fairseq.memory.index.sharded.server import RangeServer
    from fairseq.runtime.ray_cluster import connect

    rows, query_ND, found = options.rows, make_queries(options), {}
    keys = np.memmap(options.keys, np.float16, "r", shape=(rows, options.dim))
    one_process = ExactIndex(keys)
    expected = one_process.search(query_ND, options.k)
    found["connect_seconds"] = common.seconds(lambda: connect("ray", RangeServer))
    for count in (2, 4):
        began = time.perf_counter()
        index, actors = open_actors(options, rows, count)
        found[f"open_{count}_seconds"] = time.perf_counter() - began
        result = index.search(query_ND, options.k)
        if not (result.ids_NK.equal(expected.ids_NK) and result.scores_NK.equal(expected.scores_NK)):
            raise RuntimeError(f"{count} actors found other neighbours than one process")
        ours, theirs = common.in_turn(
            lambda search=index.search: search(query_ND, options.k),
            lambda: one_process.search(query_ND, options.k),
            options.repeats,
        )
        found[f"actors_{count}_seconds"], found[f"one_process_beside_{count}_seconds"] = ours, theirs
        found[f"ratio_{count}"] = common.median_ratio(theirs, ours)
        if count == 2:  # twice the keys by two workers against half of them by one
            alone = ShardedIndex(First(actors), rows // 2)
            half, both = common.in_turn(
                lambda search=alone.search: search(query_ND, options.k),
                lambda search=index.search: search(query_ND, options.k),
                options.repeats,
            )
            found["half_by_one_seconds"], found["all_by_two_seconds"] = half, both
            found["efficiency"] = common.median_ratio(half, both)
        actors.end()
    return found | {"threads": torch.get_num_threads()}


def cost_model(options: Any) -> dict[str, Any]:
    """CPU seconds of one thread against keys and shards, fitted, and what the fit says of more keys."""
    query_ND = make_queries(options)[: options.model_queries]
    search(options, query_ND, options.fitted_rows[0], 1)  # compiles
    points = [(rows, 1) for rows in options.fitted_rows]
    points += [(options.fitted_rows[1], shards) for shards in _SHARDS[1:]]
    measured = [(rows, shards, search(options, query_ND, rows, shards)) for rows, shards in points]
    design = np.array([[rows * options.dim, shards] for rows, shards, _ in measured], np.float64)
    seconds = np.array([each[2] for each in measured])
    # By relative error: small and large stores count alike.
    (per_element, per_shard), *_ = np.linalg.lstsq(design / seconds[:, None], np.ones(len(seconds)), rcond=None)
    held_out = []
    for shards in (1, _SHARDS[-1]):
        took = search(options, query_ND, options.held_out_rows, shards)
        predicted = per_element * options.held_out_rows * options.dim + per_shard * shards
        held_out.append((options.held_out_rows, shards, took, predicted))
    return {
        "cpu_seconds": measured,
        "held_out": held_out,
        "error": max(abs(predicted / took - 1) for _, _, took, predicted in held_out),
        "core_seconds_per_query_and_key_element": per_element / len(query_ND),
        "core_seconds_per_query_and_shard": per_shard / len(query_ND),
    }


def search(options: Any, query_ND: Any, rows: int, shards: int) -> float:
    """CPU seconds of searching each range by itself and merging; the smaller of two, because noise only adds."""
    import torch

    from fairseq.memory.datastore.chunked_array import as_tensor
    from fairseq.memory.index.ops.merging import best_of
    from fairseq.memory.index.sharded.server import RangeServer

    threads = torch.get_num_threads()
    servers = [RangeServer(each, 1) for each in make_ranges(options, rows, shards)]  # sets this process's threads
    took = []
    for _ in range(2):
        began = time.process_time()
        pairs = [server.search(query_ND.numpy(), options.k) for server in servers]
        best_of([(as_tensor(ids), as_tensor(scores)) for ids, scores in pairs], options.k)
        took.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return min(took)


def driver(options: Any) -> None:
    """Search by two actors and print the anonymous memory of this process, in bytes."""
    from fairseq.runtime.ray_cluster import connect

    connect("ray")
    index, actors = open_actors(options, options.driver, 2)
    index.search(make_queries(options), options.k)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sys.stdout.write(f"{int(status.split('RssAnon:')[1].split()[0]) * 1024}\n")
    actors.end()


def driver_bytes(options: Any, rows: int) -> int:
    """What :func:`driver` prints, in a process of its own."""
    words = [sys.executable, __file__, "--driver", str(rows), "--keys", options.keys, "--dim", str(options.dim)]
    words += ["--queries", str(options.queries), "--k", str(options.k)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure everything, or with --quick a small size of it."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2 * _MILLION)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--model-queries", type=int, default=128, help="queries of the cost model")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--folder", help="folder for 4 GB of keys, removed at the end (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="a 64th of the keys, to check that it runs")
    parser.add_argument("--driver", type=int, metavar="ROWS", help="print the memory of a driver of so many rows")
    parser.add_argument("--keys", help="file of keys for --driver")
    options = parser.parse_args()
    if options.driver:
        driver(options)
        return
    share = 64 if options.quick else 1
    options.rows //= share
    options.fitted_rows, options.held_out_rows = [rows // share for rows in _FITTED_ROWS], _HELD_OUT_ROWS // share
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.keys = str(Path(folder) / "keys")
        make_keys(Path(options.keys), max(options.rows, options.held_out_rows), options.dim)
        memory = {str(rows): driver_bytes(options, rows) for rows in (options.fitted_rows[0], options.fitted_rows[-1])}
        found = cost_model(options) | {"driver_bytes": memory}
        found |= compare(options)
    sizes = {name: getattr(options, name) for name in ("rows", "dim", "queries", "model_queries", "k")}
    small, large = memory.values()
    lines = [
        f"4 actors over one process: {found['ratio_4']:.3f} (wanted: >= {WANTED})",
        f"efficiency of 2 workers: {found['efficiency']:.3f} (wanted: >= {WANTED_EFFICIENCY})",
        f"error of the cost model at {options.held_out_rows} keys: {found['error']:.3f} (wanted: <= {WANTED_ERROR})",
        f"memory of the driver with 16 times the keys: {large / small:.3f} (wanted: about 1)",
        f"start: Ray {found['connect_seconds']:.1f} s, 4 actors {found['open_4_seconds']:.1f} s",
    ]
    sys.stdout.write("".join(f"  {line}\n" for line in lines))
    what = "queries/s of 2 Ray workers over one process with as many threads"
    common.tell("scale", what, found["ratio_2"], f">= {WANTED}", sizes | found, options.out)


if __name__ == "__main__":
    main()
