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
        plain, knn, tokens = _timed(data, checkpoint, f"--dstore-filename {store} {search}", options.repeats)
    ratio = common.median_ratio(plain, knn)
    details = {"plain_seconds": plain, "knn_seconds": knn, "tokens": tokens}
    name, claim, wanted = "knn_speed", "kNN over plain evaluation, tokens/s", ">= 0.6 (at least 0.4)"
    if options.exact:
        name, claim, wanted = "knn_speed_exact", "exact kNN over plain evaluation, tokens/s", ">= 0.3"
    common.tell(name, claim, ratio, wanted, details, options.out)


def _timed(data: str, checkpoint: str, memory_words: str, repeats: int) -> tuple[list[float], list[float], int]:
    from fairseq.evaluation import evaluate, open_evaluation
    from fairseq.options import parse_eval_lm
    from fairseq.perplexity import PerplexityReport
    from fairseq.sequence_scorer import SequenceScorer
    from fairseq_cli.eval_lm import open_memory

    knn = f"--knnlm --k 64 --lmbda 0.25 {memory_words}"
    words = [data, "--path", checkpoint, "--gen-subset", "valid", *EVALUATION.split(), *knn.split()]
    settings = parse_eval_lm(words)
    opened = open_evaluation(settings, in_order=False)
    memory, combine = open_memory(settings, opened)
    plain_scorer = SequenceScorer(opened.models, softmax_batch=1024)
    knn_scorer = SequenceScorer(opened.models, key_tap="last_ffn_input", softmax_batch=1024)
    report = PerplexityReport(opened.task.dictionary)
    plain, with_memory = common.in_turn(
        lambda: evaluate(plain_scorer, opened.iterator(), report),
        lambda: evaluate(knn_scorer, opened.iterator(), report, memory, combine),
        repeats,
    )
    return plain, with_memory, opened.num_scored_tokens


if __name__ == "__main__":
    main()
