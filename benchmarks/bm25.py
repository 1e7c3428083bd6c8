"""Searching 35,000 segments of 3,072 tokens takes no more than 30 minutes and 4 GB, and neighbours are alike.

All segments are indexed; of the search one shard of ``--shards`` is done and the rest reckoned at the same speed. The
neighbour rate is that of the batch file of ``--small`` segments, all of which are searched for.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

SECONDS, GIGABYTES = 30 * 60, 4.0
_TYPES, _TOPICS, _WORDS_PER_TOPIC = 250_000, 500, 100
_MARKS_SHARE, _TOPIC_SHARE = 0.3, 0.3


def main() -> None:
    """Index, search a share, line up a smaller set."""
    parser = common.parser(__doc__)
    parser.add_argument("--segments", type=int, default=35_000)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens per segment")
    parser.add_argument("--shards", type=int, default=10, help="search for one of so many parts of the segments")
    parser.add_argument("--small", type=int, default=3000, help="segments to line up")
    parser.add_argument("--text", help="file of text to cut segments from, at random places (default: made up)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        details = _line_up(Path(made) / "small", _texts(options.text, options.tokens, options.small))
        large = _search(Path(made) / "large", _texts(options.text, options.tokens, options.segments), options.shards)
    details |= large | {"segments": options.segments, "tokens_per_segment": options.tokens}
    sys.stdout.write("".join(f"{name}: {value:.3f}\n" for name, value in details.items()))
    share = max(large["seconds_for_all"] / SECONDS, large["peak_gigabytes"] / GIGABYTES)
    common.tell("bm25", "share of 30 minutes and 4 GB, the larger one", share, "<= 1", details, options.out)


def _search(folder: Path, texts: Iterator[str], shards: int) -> dict[str, float]:
    """Index all texts and search for one shard of them; what that took, and would take for all."""
    folder.mkdir(parents=True)
    _write(folder / "segments.json", texts)
    paths = ("--index_path", folder / "index", "--segments_path", folder / "segments.json")
    words = (*paths, "--results_path", folder / "results", "--num_shards", shards)
    common.run("bm25_search.py", *map(str, words))
    figures = json.loads((folder / "results" / "search0.run.json").read_text())["figures"]
    return {
        "segments_per_second": figures["num_searched"] / figures["search_seconds"],
        "share_searched": 1 / shards,
        "index_seconds": figures["index_seconds"],
        "seconds_for_all": figures["index_seconds"] + shards * figures["search_seconds"],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }


def _line_up(folder: Path, texts: Iterator[str]) -> dict[str, float]:
    """Search for all texts and make batches; the neighbour rates of these and of a shuffle."""
    _search(folder, texts, shards=1)
    words = ("--results_path", folder / "results", "--batch_file", folder / "batches.json")
    common.run("bm25_make_batches.py", *map(str, words))
    figures: dict[str, float] = json.loads((folder / "batches.json.run.json").read_text())["figures"]
    return {name: figures[name] for name in ("neighbor_rate", "neighbor_rate_of_a_shuffle")}


def _write(path: Path, texts: Iterator[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for number, text in enumerate(texts):
            file.write((",\n" if number else "\n") + json.dumps({"id": str(number), "contents": text}))
        file.write("\n]\n")


def _texts(path: str | None, tokens: int, count: int) -> Iterator[str]:
    made = _made_up(tokens) if path is None else _cut_from(path, tokens)
    return itertools.islice(made, count)


def _cut_from(path: str, tokens: int) -> Iterator[str]:
    """Pieces of a text, from random places. They overlap, and a small text has fewer words than a large one."""
    words = Path(path).read_text(encoding="utf-8").split()
    rng = np.random.default_rng(0)
    while True:
        start = int(rng.integers(max(1, len(words) - tokens)))
        yield " ".join(words[start : start + tokens])


def _made_up(tokens: int) -> Iterator[str]:
    """Texts with words as frequent as in natural text (stop words and marks too), each with words of its topic.

    A segment of 3,072 tokens has about 900 different words; one of Wikipedia's about 800.
    """
    from bm25s.stopwords import STOPWORDS_EN

    rng = np.random.default_rng(0)
    words = np.array([*STOPWORDS_EN, *(f"w{i}" for i in range(_TYPES - len(STOPWORDS_EN)))])
    # Zipf's law with Mandelbrot's offset: rank r has a share of 1 / (r + 2.7).
    edges = np.cumsum(1 / (np.arange(_TYPES) + 2.7))
    topics = rng.integers(1000, _TYPES, (_TOPICS, _WORDS_PER_TOPIC))
    while True:
        numbers = np.searchsorted(edges, rng.random(tokens) * edges[-1])
        kind = rng.random(tokens)
        numbers[kind < _TOPIC_SHARE] = rng.choice(topics[rng.integers(_TOPICS)], int((kind < _TOPIC_SHARE).sum()))
        yield " ".join(np.where(kind > 1 - _MARKS_SHARE, ",", words[numbers]))


if __name__ == "__main__":
    main()
