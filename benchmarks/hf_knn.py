"""kNN evaluation of a Hugging Face model (k 1024, 520,000 keys) reaches at least 0.8 of plain evaluation's tokens/s."""

from __future__ import annotations

import sys

import common
import hf_inputs

sys.path.insert(0, str(common.ROOT))


def main() -> None:
    """Evaluate plainly and with neighbours, in turn."""
    made = hf_inputs.parser(common.parser(__doc__))
    made.add_argument("--retomaton", action="store_true", help="measure RetoMaton instead, wanted: >= 0.7")
    made.add_argument("--members", help="clusters for RetoMaton, wanted with them: >= 0.5")
    options = made.parse_args()
    from fairseq.hf.knn.evaluation import evaluate, windows_of
    from fairseq.hf.knn.retomaton import RetomatonWrapper
    from fairseq.hf.knn.wrapper import KNNWrapper

    inputs = hf_inputs.load(options)
    model, windows = inputs.model, windows_of(inputs.ids, 256, 128, tail=False)
    wrapper = KNNWrapper(dstore_dir=inputs.store, k=1024, probe=32)
    name, wanted = "hf_knn", ">= 0.8"
    if options.retomaton:
        wrapper = RetomatonWrapper(dstore_dir=inputs.store, k=1024, probe=32, members=options.members)
        name, wanted = ("hf_clusters", ">= 0.5") if options.members else ("hf_retomaton", ">= 0.7")

    def plainly() -> None:
        with wrapper.paused():  # broken into the model, it would search in a plain evaluation too
            evaluate(model, windows)

    with wrapper(model):
        plain, memory = common.in_turn(plainly, lambda: evaluate(model, windows, wrapper), options.repeats)
    details = {
        "model": inputs.name,
        "plain_seconds": plain,
        "memory_seconds": memory,
        "tokens": sum(len(w.ids_T) for w in windows),
    }
    ratio = common.median_ratio(plain, memory)
    common.tell(name, "evaluation with memory over plain, tokens/s", ratio, wanted, details, options.out)


if __name__ == "__main__":
    main()
