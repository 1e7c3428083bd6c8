"""Exact and approximate search of real keys against other libraries: queries/s, recall, memory and building time.

Keys are hidden states of SmolLM2 and of a GPT-2 (``real_keys.py``). The ratio is that of exact search to the fastest
exact peer, the smallest over all k, numbers of threads and models. More lines compare approximate indexes at k 1024 on
one thread: the smallest ratios of our front to a peer's point of the same recall, where ours has at most 1.1 times its
memory. ``pip install -e '.[bench]'`` installs the peers; those that are missing are passed over.

A large run may be cut into parts (``--models``, ``--threads``, ``--k``, ``--parts``) with an ``--out`` each;
``--show FILE ...`` prints the tables of several records, and ``--plot`` draws them.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import peer_libraries
import peer_report
import real_keys

WANTED = 1.2
_CHECKED = 256  # queries whose recall is measured
_SLACK = 1e-6  # of squared lengths: rounding of float32 products
_SLOW = 3.0
_WORST = 12  # points of peers that are printed
_DONE, _GAIN = 0.995, 0.001  # recall at which a series of searches ends, and what a step must gain

Array = npt.NDArray[Any]


class Truth:
    """All scores of some queries in float64, to measure recall by."""

    def __init__(self, keys_MD: Array, query_ND: Array) -> None:
        step = max(1, len(query_ND) // _CHECKED)
        self.rows = slice(0, step * _CHECKED, step)
        query_QD = query_ND[self.rows].astype(np.float64)
        self.score_QM = np.empty((len(query_QD), len(keys_MD)))
        largest = 0.0
        for first in range(0, len(keys_MD), 16384):
            part_MD = keys_MD[first : first + 16384].astype(np.float64)
            square_M = np.square(part_MD).sum(1)
            largest = max(largest, float(square_M.max()))
            self.score_QM[:, first : first + 16384] = 2 * query_QD @ part_MD.T - square_M
        self._slack_Q = _SLACK * (np.square(query_QD).sum(1) + largest)

    def recall(self, ids_NK: Array) -> float:
        """Share of the k nearest that was found, by scores: of keys that are equally close, any may be found."""
        ids_QK, k = ids_NK[self.rows], ids_NK.shape[1]
        kth_Q = np.partition(self.score_QM, -k, axis=1)[:, -k]
        found_QK = np.take_along_axis(self.score_QM, np.maximum(ids_QK, 0), axis=1)
        distinct = all(len(np.unique(ids[ids >= 0])) == (ids >= 0).sum() for ids in ids_QK)
        if not distinct:
            raise RuntimeError("a search returned a key twice")
        return float(((ids_QK >= 0) & (found_QK >= (kth_Q - self._slack_Q)[:, None])).mean())


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def timed_in_turn(
    calls: Sequence[Callable[[], Array]], truth: Truth, repeats: int
) -> tuple[list[float], list[list[tuple[float, float]]]]:
    """Recall of each search, and its seconds as often as asked, A B C A B C, after one uncounted turn.

    What takes more than three times as long as the fastest peer in that turn is timed once.
    """
    found: list[Array] = []
    first = [timed(lambda call=call: found.append(call())) for call in calls]
    slow = _SLOW * min(wall for wall, _ in first[1:] or first)
    figures: list[list[tuple[float, float]]] = [[] for _ in calls]
    for turn in range(repeats):
        for number, call in enumerate(calls):
            if turn == 0 or number == 0 or first[number][0] <= slow:  # ours is the first
                figures[number].append(timed(call))
    return [truth.recall(ids_NK) for ids_NK in found], figures


def rate(figures: Sequence[tuple[float, float]], count: int) -> dict[str, float]:
    """Median queries/s, and the cores that were busy meanwhile."""
    seconds = statistics.median(wall for wall, _ in figures)
    return {
        "queries_per_second": count / seconds,
        "slowest": count / max(wall for wall, _ in figures),
        "fastest": count / min(wall for wall, _ in figures),
        "cores": statistics.median(cpu / wall for wall, cpu in figures),
    }


def measure_exact(keys: real_keys.KeySet, truth: Truth, options: Any) -> Iterator[list[dict[str, Any]]]:
    """Every exact index at each k, in turn: rows of one k after the other."""
    keys_MD, query_ND = keys.keys_MD.astype(np.float32), keys.query_ND.astype(np.float32)
    contenders = installed(peer_libraries.EXACT)
    with peer_libraries.threads(max(options.threads)):
        opened = [timed_build(each, keys_MD) for each in contenders]
    for count in options.threads:
        for each, _ in opened:
            each.set_threads(count)
        for k in options.k:
            calls = [lambda each=each, k=k: each.search(query_ND, k, None) for each, _ in opened]
            with peer_libraries.threads(count):
                recalls, rounds = timed_in_turn(calls, truth, options.repeats)
            rows = []
            for contender, (index, built), recall, figures in zip(contenders, opened, recalls, rounds):
                rows.append(
                    facts(keys, contender, exact=True)
                    | {"threads": count, "k": k, "recall": recall, "build_seconds": built}
                    | {"bytes_per_key": index.bytes_per_key, "kept_per_key": index.kept_per_key()}
                    | rate(figures, len(query_ND))
                )
                report_row(rows[-1])
            yield rows


def measure_approximate(keys: real_keys.KeySet, truth: Truth, options: Any) -> Iterator[list[dict[str, Any]]]:
    """Every approximate index, with ever more effort at each k: rows of one index after the other."""
    keys_MD, query_ND = keys.keys_MD.astype(np.float32), keys.query_ND.astype(np.float32)
    for contender in installed(peer_libraries.approximate(*keys_MD.shape)):
        if options.only and not any(word in contender.name for word in options.only):
            continue
        rows: list[dict[str, Any]] = []
        with peer_libraries.threads(max(options.threads)):
            index, built = timed_build(contender, keys_MD)
        for count in options.threads:
            index.set_threads(count)
            with peer_libraries.threads(count):
                for k in options.k:
                    sweeps = [sweep(index, each, query_ND, k, truth, options.repeats) for each in contender.efforts]
                    known = facts(keys, contender, exact=False) | {"threads": count, "k": k, "build_seconds": built}
                    rows += [known | row for found in sweeps for row in found]
                    report_row(rows[-1])
        del index
        gc.collect()
        yield rows


PARTS = {"exact": measure_exact, "approximate": measure_approximate}


def timed_build(contender: peer_libraries.Contender, keys_MD: Array) -> tuple[peer_libraries.Opened, float]:
    """The index and the seconds its building took."""
    began = time.perf_counter()
    return contender.open(keys_MD), time.perf_counter() - began


def sweep(
    index: peer_libraries.Opened, series: Sequence[Any], query_ND: Array, k: int, truth: Truth, repeats: int
) -> list[dict[str, Any]]:
    """Recall and queries/s with ever more effort, until that finds no more."""
    rows: list[dict[str, Any]] = []
    for effort in series:
        call = lambda effort=effort: index.search(query_ND, k, effort)  # noqa: E731
        recall = truth.recall(call())
        figures = [timed(call) for _ in range(repeats)]
        rows.append(
            {
                "effort": effort,
                "recall": recall,
                "bytes_per_key": index.bytes_per_key,
                "kept_per_key": index.kept_per_key(),
            }
        )
        rows[-1] |= rate(figures, len(query_ND))
        stalled = len(rows) > 3 and recall - rows[-2]["recall"] < _GAIN  # more effort finds no more
        if recall >= _DONE or stalled:
            break
    return rows


def installed(contenders: Sequence[peer_libraries.Contender]) -> list[peer_libraries.Contender]:
    """Those that can be measured; one line for each of the others."""
    for each in contenders:
        if not each.is_installed():
            sys.stdout.write(f"  {each.library} is not installed: pip install -e '.[bench]'\n")
    return [each for each in contenders if each.is_installed()]


def facts(keys: real_keys.KeySet, contender: peer_libraries.Contender, *, exact: bool) -> dict[str, Any]:
    """What a row says of its keys, library and machine."""
    sizes = {"rows": len(keys.keys_MD), "dim": keys.keys_MD.shape[1], "queries": len(keys.query_ND)}
    return {"keys": keys.name, "model": keys.model, "index": contender.name, "ours": contender.ours, "exact": exact} | (
        sizes | {"cpu": peer_report.cpu()}
    )


def report_row(row: dict[str, Any]) -> None:
    """Print one line of progress."""
    sys.stdout.write(
        f"  {row['keys']} {row['index']}: {row['threads']} threads, k {row['k']}: recall {row['recall']:.4f}, "
        f"{row['queries_per_second']:.0f} queries/s ({row['slowest']:.0f} to {row['fastest']:.0f}, "
        f"{row['cores']:.2f} cores), {row['bytes_per_key']:.0f} bytes per key, built in {row['build_seconds']:.1f} s\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Measure, or show what was measured."""
    parser = common.parser(__doc__ or "")
    real_keys.add_flags(parser)
    parser.add_argument("--k", type=int, nargs="*", default=[1, 10, 100, 1024])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="*", help="approximate indexes with one of these words in their names")
    parser.add_argument("--show", nargs="*", help="records of earlier runs: print their tables instead of measuring")
    parser.add_argument("--plot", help="picture of recall and queries/s at k 1024 on one thread")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for file in options.show or []:
        with open(file, encoding="utf-8") as record:
            rows += json.load(record)["figures"]["rows"]
    for name in [] if options.show else options.models:
        keys = real_keys.load(name, options)
        truth = Truth(keys.keys_MD, keys.query_ND)
        for part in options.parts:
            for found in PARTS[part](keys, truth, options):
                rows += found
                if options.out:  # so that a run that is stopped leaves what it measured
                    with open(options.out, "w", encoding="utf-8") as record:
                        json.dump({"figures": {"rows": rows}}, record, default=float)
    sys.stdout.write(peer_report.tables(rows))
    exact, approximate = peer_report.exact_ratio(rows), peer_report.front_ratios(rows)
    for line in approximate[:_WORST]:
        sys.stdout.write(
            f"  our front over {line['keys']} {line['index']} at recall {line['recall']:.4f}: {line['ratio']:.3f} "
            f"with as much memory, {line['index_ratio']:.3f} with an index as large\n"
        )
    if not options.show or options.out:
        what = "exact search over the fastest exact peer, queries/s, the least over k, threads and models"
        ratio, wanted, details = exact, f">= {WANTED}", {"rows": rows, "fronts": approximate}
        if approximate and math.isnan(exact):
            what, ratio, wanted = "our front over each point of a peer, the least", approximate[0]["ratio"], ">= 1"
        common.tell("peers", what, ratio, wanted, details, options.out)
    if options.plot:
        peer_report.plot(rows, options.plot)


if __name__ == "__main__":
    main()
