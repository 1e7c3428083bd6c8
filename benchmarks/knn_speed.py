"""kNN evaluation (k 64, L2 from the full keys) over plain evaluation, tokens/s; with an index, or exactly."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

EVALUATION = (
    "--cpu --sample-break-mode complete --max-tokens 256 --context-window 192 --softmax-batch 1024 --max-sentences 1"
)


def main() -> None:
    """Evaluate plainly and with neighbours, in turn."""
    parser = common.parser(__doc__, *common.INPUTS)
    parser.add_argument("--exact", action="store_true", help="search the keys themselves; wanted: >= 0.3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        data, checkpoint, store, index = common.store_inputs(options, Path(made), "l2")
        search = "" if options.exact else f"--indexfile {index} --probe 8"
        words = f"{EVALUATION} --knnlm --k 64 --lmbda 0.25 --dstore-filename {store} {search}".split()
        words = [data, "--path", checkpoint, "--gen-subset", "valid", *words]
        plain, knn, tokens, _ = common.plain_and_knn(words, options.repeats)
    ratio = common.median_ratio(plain, knn)
    details = {"plain_seconds": plain, "knn_seconds": knn, "tokens": tokens}
    name, claim, wanted = "knn_speed", "kNN over plain evaluation, tokens/s", ">= 0.6"
    if options.exact:
        name, claim, wanted = "knn_speed_exact", "exact kNN over plain evaluation, tokens/s", ">= 0.3"
    common.tell(name, claim, ratio, wanted, details, options.out)


if __name__ == "__main__":
    main()
