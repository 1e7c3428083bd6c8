"""Saving keys runs at no less than 0.9 of the speed of the bare forward pass without softmax."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))


def main() -> None:
    """Save the same text again and again, in turn with forward passes over batches that lie ready."""
    parser = common.parser(__doc__, "data", "checkpoint")
    parser.add_argument("--subset", default="valid")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data, checkpoint = common.model_inputs(options, folder, 1_000_000)
        saving, bare, tokens = _timed(data, checkpoint, options.subset, folder / "dstore", options.repeats)
    ratio = common.median_ratio(bare, saving)
    details = {"saving_seconds": saving, "bare_forward_seconds": bare, "tokens": tokens}
    common.tell("save_speed", "saving over bare forward, tokens/s", ratio, ">= 0.9", details, options.out)


def _timed(
    data: Path, checkpoint: Path, subset: str, prefix: Path, repeats: int
) -> tuple[list[float], list[float], int]:
    import torch

    from fairseq.evaluation.save_datastore import save_datastore, store_rows
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.memory.datastore.writer import DatastoreWriter
    from fairseq.options import evaluation_configs, parse_eval_lm
    from fairseq.sequence_scorer import SequenceScorer

    more = "--cpu --max-tokens 256 --context-window 192 --tokens-per-sample 64 --save-knnlm-dstore --dstore-mmap x"
    opened = open_evaluation(
        evaluation_configs(
            parse_eval_lm([str(data), "--path", str(checkpoint), "--gen-subset", subset, *more.split()])
        ),
        in_order=True,
    )
    model = opened.models[0]
    scorer = SequenceScorer(opened.models, key_tap="last_ffn_input")
    rows, dim = store_rows(opened, None).count, model.key_dim("last_ffn_input")

    def save() -> None:
        with DatastoreWriter(prefix, num_rows=rows, dim=dim, resume=False) as writer:
            save_datastore(opened, scorer, writer, with_scores=False)

    def forward() -> None:
        with torch.inference_mode():
            for tokens_BT in ready:
                model(tokens_BT)

    ready = [batch.tokens_BT for batch in opened.iterator()]
    saving, bare = common.in_turn(save, forward, repeats)
    return saving, bare, opened.num_scored_tokens


if __name__ == "__main__":
    main()
