"""Greedy generation of 128 tokens with kNN-LM (520,000 keys) takes at most 1.25 times as long as plain generation."""

from __future__ import annotations

import sys

import common
import hf_inputs

sys.path.insert(0, str(common.ROOT))


def main() -> None:
    """Generate plainly and with neighbours, in turn."""
    options = hf_inputs.parser(common.parser(__doc__)).parse_args()
    import torch

    from fairseq.hf.knn.wrapper import KNNWrapper

    inputs = hf_inputs.load(options)
    model, prompt = inputs.model, torch.tensor(inputs.ids[:32])[None]
    settings = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        assert model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).shape[1] == 160

    with torch.inference_mode(), KNNWrapper(dstore_dir=inputs.store, k=1024, probe=32)(model) as knn:

        def plain() -> None:
            with knn.paused():
                generate()

        without, with_memory = common.in_turn(plain, generate, options.repeats)
    details = {"model": inputs.name, "plain_seconds": without, "knn_seconds": with_memory, "tokens": 128}
    ratio = common.median_ratio(with_memory, without)
    common.tell("hf_generate", "generation with kNN-LM over plain, seconds", ratio, "<= 1.25", details, options.out)


if __name__ == "__main__":
    main()
