"""What share of plain evaluation's tokens/s RetoMaton's evaluation of a fairseq model reaches (k 1024).

The shares that are wanted are of a larger model: ``hf_knn.py --retomaton``. Beside a small one this times the search.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

EVALUATION = "--cpu --sample-break-mode none --max-tokens 2048 --tokens-per-sample 128 --context-window 128"


def main() -> None:
    """Evaluate plainly and with the automaton, in turn."""
    parser = common.parser(__doc__.splitlines()[0], *common.INPUTS)
    parser.add_argument("--num-clusters", type=int, default=2000, help="clusters, made anew; 0 for none")
    parser.add_argument("--min-knns", type=int, default=1)
    parser.add_argument("--probe", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        inputs = common.store_inputs(options, Path(made), "l2")
        knn = f"--knnlm --k 1024 --probe {options.probe} --lmbda 0.25 --retomaton --min-knns {options.min_knns}"
        if options.num_clusters:
            clusters = f"{made}/clusters.npz"
            words = f"--cluster_dstore --num_clusters {options.num_clusters} --sample_size 100000 --clusters {clusters}"
            common.run("build_dstore.py", "--dstore_mmap", inputs[2], *words.split())
            knn += f" --clusters {clusters}"
        details = _timed(*inputs, knn, options.repeats)
    ratio = common.median_ratio(details["plain_seconds"], details["retomaton_seconds"])
    what = f"RetoMaton with {options.num_clusters} clusters over plain evaluation, tokens/s"
    name = f"retomaton_{options.num_clusters}" if options.num_clusters else "retomaton"
    common.tell(name, what, ratio, "-", details | {"min_knns": options.min_knns}, options.out)


def _timed(data: str, checkpoint: str, store: str, index: str, knn: str, repeats: int) -> dict[str, Any]:
    words = [data, "--path", checkpoint, "--gen-subset", "valid", *EVALUATION.split(), *knn.split()]
    words += ["--dstore-filename", store, "--indexfile", index, "--no-load-keys"]
    plain, automaton, tokens, reader = common.plain_and_knn(words, repeats)
    saved = 1.0 - reader.num_searched / reader.num_positions
    figures = {"plain_seconds": plain, "retomaton_seconds": automaton, "tokens": tokens}
    return figures | {"saved_searches": saved}


if __name__ == "__main__":
    main()
