"""Time of searching segments against bm25s' own retrieve on the same index, with the same neighbours.

bm25s is measured by its two backends, numpy and numba, with as many threads as there are CPUs; the faster one counts.
Queries are whole segments of the index, as in bm25_search.py, tokenised by either side. bm25s scores every occurrence
of a word, so that both have the same scores; it also returns the query itself, which is left out here.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25
import common

sys.path.insert(0, str(common.ROOT))

BACKENDS = ("numpy", "numba")


def peer(folder: str, texts: list[str], k: int, backend: str) -> Callable[[], list[list[int]]]:
    """Retrieval by bm25s from the index in a folder, as a call without arguments."""
    import bm25s

    retriever = bm25s.BM25.load(folder, mmap=False)
    retriever.backend = backend
    if backend == "numba":
        retriever.activate_numba_scorer()
    split = bm25s.tokenization.Tokenizer(stopwords="en").splitter
    threads = os.cpu_count() or 1

    def run() -> list[list[int]]:
        queries = [[word for word in split(text.lower()) if word in retriever.vocab_dict] for text in texts]
        found = retriever.retrieve(queries, k=k + 1, show_progress=False, n_threads=threads, sorted=True)
        return found.documents.tolist()  # type: ignore[no-any-return]

    return run


def agreement(own: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of our neighbours that are among theirs."""
    same = sum(len(set(a) & set(b)) for a, b in zip(own, theirs))
    return same / max(1, sum(map(len, own)))


def main() -> None:
    """Search on both sides in turn."""
    made = common.parser(__doc__)
    made.add_argument("--segments", type=int, default=35_000)
    made.add_argument("--tokens", type=int, default=3072, help="tokens per segment")
    made.add_argument("--queries", type=int, default=64, help="one batch of bm25_search.py")
    made.add_argument("--k", type=int, default=20)
    made.add_argument("--folder", help="where segments and index are kept, or are already (default: made anew)")
    options = made.parse_args()
    from fairseq.data.bm25.index import open_index
    from fairseq.data.segments import read_segments

    with tempfile.TemporaryDirectory() as made_here:
        folder = Path(options.folder or made_here)
        segments, where = folder / "segments.json", folder / "index"
        if not segments.exists():
            bm25._write(segments, bm25._texts(None, options.tokens, options.segments))
        index = open_index(where, segments)
        texts = list(itertools.islice(read_segments(segments), options.queries))

        def own() -> list[list[int]]:
            return index.search(texts, 0, options.k)

        details: dict[str, Any] = {"segments": index.num_documents, "queries": options.queries, "k": options.k}
        ratios = {}
        for backend in BACKENDS:
            with common.in_own_process(peer, str(where), texts, options.k, backend) as theirs:
                details[f"agreement_{backend}"] = agreement(own(), theirs())
                seconds, other = common.in_turn(own, theirs, options.repeats)
            ratios[backend] = common.median_ratio(other, seconds)
            details |= {f"own_seconds_{backend}": seconds, f"bm25s_seconds_{backend}": other}
    what = f"bm25s' seconds over ours, {options.queries} segments, the faster of {' and '.join(BACKENDS)}"
    common.tell("bm25_peers", what, min(ratios.values()), ">= 2", details | {"ratios": ratios}, options.out)
    for name, ratio in ratios.items():
        median = statistics.median(details[f"bm25s_seconds_{name}"])
        same = details[f"agreement_{name}"]
        sys.stdout.write(f"  {name}: {ratio:.2f}, {median:.2f} s for bm25s; {same:.4f} of the neighbours the same\n")


if __name__ == "__main__":
    main()
