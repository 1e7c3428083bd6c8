"""Exact search in a store that is read as one larger than memory, over the disk's rate; memory, and time over keys."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

WANTED = 0.8
_CENTERS, _BASE_ROWS, _PART_ROWS = 2000, 131_072, 16_384
_NOISE = 0.5  # of the keys' own deviation
_SIZES = (48, 12, 3, 1)  # a store of 12 million keys is searched up to 0.25, 1, 4 and 12 million
_SHARED_BYTES = 1 << 30
_PIECE = 4 << 20


def base_keys(options: Any) -> Any:
    """Keys to be repeated: those of a file, or made-up ones in loose clusters, as hidden states are."""
    import torch

    if options.keys:
        return torch.from_numpy(np.load(options.keys).astype(np.float32))
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((_CENTERS, options.dim), dtype=np.float32)
    noise = rng.standard_normal((min(_BASE_ROWS, options.rows), options.dim), dtype=np.float32)
    return torch.from_numpy(centers[rng.integers(0, _CENTERS, len(noise))] + noise)


def make_store(prefix: Path, options: Any) -> Path:
    """A float16 store of the keys, repeated with noise; returns the file of its keys."""
    import torch

    from fairseq.memory.datastore.layout import StoreFiles
    from fairseq.memory.datastore.writer import DatastoreWriter

    base_MD = base_keys(options)
    deviation = _NOISE * float(base_MD[:_PART_ROWS].std())

    def part(start: int) -> Any:
        rows_M = torch.arange(start, min(start + _PART_ROWS, options.rows))
        generator = torch.Generator().manual_seed(start)
        noise_MD = torch.empty(len(rows_M), base_MD.shape[1]).normal_(0, deviation, generator=generator)
        return noise_MD.add_(base_MD[rows_M % len(base_MD)]).half()

    starts = range(0, options.rows, _PART_ROWS)
    with DatastoreWriter(prefix, options.rows, base_MD.shape[1], "float16") as writer, ThreadPoolExecutor(2) as pool:
        for first in range(0, len(starts), 4):
            for rows_MD in pool.map(part, starts[first : first + 4]):
                writer.append(rows_MD, torch.arange(len(rows_MD)))
            writer.checkpoint_when_due()
        writer.finish()
    return StoreFiles.of(prefix, "float16").keys


def opened(path: Path, rows: int, dim: int) -> Any:
    """The first rows of the file, read as if they were larger than memory."""
    from fairseq.memory.datastore.chunked_array import ChunkedArray

    return ChunkedArray([np.memmap(path, np.float16, "r", shape=(rows, dim))], exceeds_ram=True)


def search_once(path: Path, rows: int, queries: int, options: Any) -> None:
    """Search, and print seconds and peak memory."""
    import torch

    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.types import Metric

    keys = opened(path, rows, options.dim)
    drawn_N = torch.from_numpy(np.random.default_rng(1).choice(rows, queries, replace=False))
    query_ND = keys.take(drawn_N)
    query_ND += _NOISE * query_ND.std() * torch.randn(query_ND.shape, generator=torch.Generator().manual_seed(2))
    warm = np.random.default_rng(3).standard_normal((4096, options.dim), dtype=np.float32)
    ExactIndex(warm, Metric(options.metric)).search(query_ND[:64], min(64, options.k))  # kernels are loaded
    index = ExactIndex(keys, Metric(options.metric))
    began, cpu = time.perf_counter(), time.process_time()
    index.search(query_ND, options.k)
    figures = {"rows": rows, "queries": queries, "seconds": time.perf_counter() - began}
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    sys.stdout.write(json.dumps(figures | {"cpu_seconds": time.process_time() - cpu, "peak": peak}))


def read_shared(path: Path) -> None:
    """Read a file that fits the page cache again and again; print the seconds of each time."""
    buffer = bytearray(_PIECE)
    while True:
        began = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        sys.stdout.write(f"{time.perf_counter() - began}\n")
        sys.stdout.flush()
        time.sleep(0.2)


def child(options: Any, path: Path, rows: int, queries: int) -> dict[str, Any]:
    """:func:`search_once` in its own process."""
    words = [sys.executable, __file__, "--search", str(path), str(rows), str(queries), "--dim", str(options.dim)]
    words += ["--k", str(options.k), "--metric", options.metric]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def products_per_second(dim: int) -> float:
    """Multiplications of the products that searches on this CPU are made of, by all threads at once."""
    import torch

    from fairseq.memory.index.ops import products as ways
    from fairseq.runtime.threads import run_in_threads

    products, threads, times = ways.chosen(), torch.get_num_threads(), 200
    columns = products.columns(dim)
    left_QD, right_MD = (torch.ones(rows, columns, dtype=products.dtype) for rows in (256, 2048))
    keys, start_M = products.lay_out(right_MD)

    def multiply(_: int) -> None:
        out_QM = torch.empty(256, 2048, dtype=products.raw_dtype)
        for _ in range(times):
            products.multiply(left_QD, keys, start_M, out_QM)

    multiply(0)
    return threads * times * 256 * 2048 * dim / common.seconds(lambda: run_in_threads(multiply, range(threads)))


def pass_through_map(path: Path, rows: int, dim: int) -> None:
    """Touch every page of the rows, in order, through a memory map."""
    mapped = np.memmap(path, np.uint8, "r", shape=(2 * rows * dim,))
    for start in range(0, len(mapped), _PIECE):
        mapped[start : start + _PIECE : 4096].sum()


def neighbor(options: Any, path: Path, folder: Path) -> dict[str, Any]:
    """Seconds of another process's reads of a cached file: alone, while a store is searched, and while it is read
    through a map."""
    shared = folder / "shared"
    with open(shared, "wb") as file:
        for _ in range(_SHARED_BYTES // _PIECE):
            file.write(os.urandom(_PIECE))
    words = [sys.executable, __file__, "--read", str(shared)]
    found: dict[str, Any] = {}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        lines: list[tuple[float, float]] = []
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: lines.extend((time.perf_counter(), float(line)) for line in reader.stdout or ()))
            calls = {
                "alone": lambda: time.sleep(5),
                "searched": lambda: child(options, path, options.rows, options.few),
                "mapped": lambda: pass_through_map(path, options.rows, options.dim),
            }
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                took = [seconds for at, seconds in lines if began < at - seconds]
                found[name] = {"seconds": time.perf_counter() - began, "reads": took}
                time.sleep(2)
            reader.kill()
    os.remove(shared)
    for name, of in found.items():
        median = statistics.median(of["reads"]) if of["reads"] else float("nan")
        worst = max(of["reads"], default=float("nan"))
        line = f"  {name}: {of['seconds']:.1f} s; another process's GB of cached reads takes {median:.2f} s, at most"
        sys.stdout.write(f"{line} {worst:.2f} s\n")
    return found


def measure(options: Any, path: Path, folder: Path) -> dict[str, Any]:
    """All figures."""
    from fairseq.memory.planning.measure import read_rate

    details: dict[str, Any] = {name: getattr(options, name) for name in ("rows", "dim", "k", "metric", "few")}
    details["products_per_second"] = products_per_second(options.dim)
    details["searches"] = []
    for queries in dict.fromkeys((options.few, options.queries)):
        for share in _SIZES:
            rows = max(options.k, options.rows // share)
            # The same bytes: a virtual disk may read the first GB of a file faster than the others.
            rate = read_rate(path, past=2 * rows * options.dim)
            found = child(options, path, rows, queries)
            found["read_rate"] = rate
            found["disk_seconds"] = 2 * rows * options.dim / found["read_rate"]
            found["product_seconds"] = queries * rows * options.dim / details["products_per_second"]
            details["searches"].append(found)
            sys.stdout.write(
                f"  {rows} keys, {queries} queries: {found['seconds']:.2f} s, disk {found['disk_seconds']:.2f} s, "
                f"products {found['product_seconds']:.2f} s, peak {found['peak'] / 2**20:.0f} MiB\n"
            )
        made = [found for found in details["searches"] if found["queries"] == queries]
        fit(details, queries, made)
    details["neighbor"] = neighbor(options, path, folder)
    return details


def fit(details: dict[str, Any], queries: int, made: list[dict[str, Any]]) -> None:
    """Seconds as a + b n, by least squares of relative errors."""
    rows_S, seconds_S = (np.array([found[name] for found in made], float) for name in ("rows", "seconds"))
    terms_ST = np.stack([np.ones(len(made)), rows_S], 1) / seconds_S[:, None]
    fixed, per_key = np.linalg.lstsq(terms_ST, np.ones(len(made)), rcond=None)[0]
    error = float(np.abs((fixed + per_key * rows_S) / seconds_S - 1).max())
    details[f"fit_{queries}"] = {"fixed": fixed, "per_key": per_key, "largest_error": error}
    sys.stdout.write(
        f"  {queries} queries: {fixed:.2f} s + {per_key * 1e6:.2f} s a million keys, within {100 * error:.0f}%\n"
    )


def main() -> None:
    """Make a store, search parts of it, and watch another process meanwhile."""
    from fairseq.memory.datastore.layout import StoreFiles

    parser = common.parser(__doc__, "keys", "store")
    parser.add_argument("--rows", type=int, default=1 << 20)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--few", type=int, default=64, help="queries whose products take less time than the disk")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2")
    parser.add_argument("--folder", help="folder for the store, removed afterwards (default: a temporary one)")
    parser.add_argument("--search", nargs=3, metavar=("FILE", "ROWS", "QUERIES"), help="search once")
    parser.add_argument("--read", metavar="FILE", help="read a file again and again")
    options = parser.parse_args()
    if options.search:
        path, rows, queries = options.search
        search_once(Path(path), int(rows), int(queries), options)
        return
    if options.read:
        read_shared(Path(options.read))
        return
    if options.keys:
        options.dim = np.load(options.keys, mmap_mode="r").shape[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        path = (
            StoreFiles.of(options.store, "float16").keys if options.store else make_store(Path(made) / "store", options)
        )
        details = measure(options, path, Path(made))
    few = next(found for found in details["searches"] if found["rows"] == options.rows)
    many = details["searches"][-1]
    roofline = max(many["disk_seconds"], many["product_seconds"]) / many["seconds"]
    details |= {"roofline": roofline, "peak": max(found["peak"] for found in details["searches"])}
    name = (
        f"rate of reading {options.rows} keys over the disk's, {options.few} queries ({options.queries} queries: "
        f"{roofline:.2f} of the disk's or the products'), peak {details['peak'] / 2**20:.0f} MiB"
    )
    common.tell("larger_than_memory", name, few["disk_seconds"] / few["seconds"], f">= {WANTED}", details, options.out)


if __name__ == "__main__":
    main()
