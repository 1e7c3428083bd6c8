"""Beam search takes at most half the time of transformers' generate: translation, and a model of GPT-2's shape.

Translation: Marian's shape of two layers, 256 sentences of 16 tokens, 20 tokens each. Language model: GPT-2 small's
shape cut to four layers, with the same weights on both sides, 8 beginnings of 16 tokens, 32 tokens each. The peer runs
in a process of its own as its users run it; ours sets the allocator as our commands do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import common
import gpt2_inputs
import mt_generate

sys.path.insert(0, str(common.ROOT))

BEAMS = (4, 1)
NUM_TEXTS, BEGINNING, CONTINUED = 8, 16, 32
Run = Callable[[], Any]


def marian(beam: int) -> Run:
    """Translation by transformers' Marian of our model's shape, with random weights."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    one = {"layers": 2, "ffn_dim": 256, "attention_heads": 4}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in one.items()}
    torch.manual_seed(0)
    special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    config = MarianConfig(vocab_size=mt_generate.VOCABULARY, d_model=mt_generate.WIDTH, dropout=0.0, **both, **special)
    model = MarianMTModel(config).eval()
    source = mt_generate.random_source()
    tokens = mt_generate.TOKENS
    settings = {"num_beams": beam, "min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}

    def run() -> None:
        made = model.generate(source, attention_mask=torch.ones_like(source), **settings)
        assert made.shape[1] == tokens + 1

    return run


def translation(beam: int) -> Run:
    """Ours."""
    from fairseq.generation.sequence_generator import SequenceGenerator

    model, dictionary, batches, config = mt_generate.random_setting(beam)
    generator = SequenceGenerator([model], dictionary, config)

    def run() -> None:
        for source, lengths in batches:
            assert all(len(texts[0].tokens) == mt_generate.TOKENS for texts in generator.generate(source, lengths))

    return run


def beginnings() -> Any:
    """int64 (texts, tokens)."""
    import torch

    torch.manual_seed(0)
    return torch.randint(4, gpt2_inputs.VOCABULARY, (NUM_TEXTS, BEGINNING))


def gpt2(beam: int) -> Run:
    """Continuations by transformers' GPT-2."""
    import torch

    model, begun = gpt2_inputs.peer().eval(), beginnings()
    given = torch.cat([torch.full((NUM_TEXTS, 1), 2), begun], 1)  # our texts begin with </s>
    settings = {"num_beams": beam, "min_new_tokens": CONTINUED, "max_new_tokens": CONTINUED, "do_sample": False}

    def run() -> list[list[int]]:
        made = model.generate(
            given, attention_mask=torch.ones_like(given), use_cache=True, pad_token_id=1, eos_token_id=2, **settings
        )
        return made[:, 1:].tolist()  # type: ignore[no-any-return]

    return run


def language_model(beam: int) -> Run:
    """Ours, with the same weights."""
    from fairseq.generation.config import GenerationConfig
    from fairseq.generation.sequence_generator import SequenceGenerator

    length = BEGINNING + CONTINUED
    search = GenerationConfig(beam=beam, min_len=length, max_len_b=length)
    generator = SequenceGenerator([gpt2_inputs.own()], mt_generate.made_up_dictionary(gpt2_inputs.VOCABULARY), search)
    begun = beginnings()

    def run() -> list[list[int]]:
        found = generator.generate({}, [BEGINNING] * NUM_TEXTS, begun)
        return [texts[0].tokens[:length].tolist() for texts in found]

    return run


SIDES: dict[str, tuple[Callable[[int], Run], Callable[[int], Run]]] = {
    "translation": (translation, marian),
    "lm": (language_model, gpt2),
}


def main() -> None:
    """Generate on both sides in turn."""
    made = common.parser(__doc__)
    made.add_argument("--only", choices=sorted(SIDES), help="one of the two")
    options = made.parse_args()
    from fairseq_cli.entry import keep_freed_memory

    keep_freed_memory()
    for name, (ours, peers) in SIDES.items():
        if options.only not in (None, name):
            continue
        for beam in BEAMS:
            own = ours(beam)
            with common.in_own_process(peers, beam) as peer:
                same = own() == peer()  # of the language model; the translation models have weights of their own
                seconds, other = common.in_turn(own, peer, options.repeats)
            details = {"own_seconds": seconds, "transformers_seconds": other, "same_texts": same}
            what = f"transformers' seconds over ours, {name}, beam {beam}"
            wanted = ">= 2" if beam > 1 else "-"
            common.tell(f"generate_{name}_beam{beam}", what, common.median_ratio(other, seconds), wanted, details,
                        options.out)  # fmt: skip


if __name__ == "__main__":
    main()
