"""Memories inside attention cost time linear in the prompt, and little beside the model.

A random Llama of three layers reads prompts of 256, 512 and 1024 tokens with 4,096 memories and without, and takes
decode steps with 16,384 memories and without. The ratio told is the one of prompts of 1024 tokens.
"""

from __future__ import annotations

import inspect
import statistics
import sys
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

PROMPTS = (256, 512, 1024)
PROMPT_MEMORIES, DECODE_MEMORIES = 4096, 16384


def random_llama(hidden: int, heads: int, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def prompt_times(model: Any, memory: Any, vocabulary: int, repeats: int) -> dict[int, tuple[list[float], list[float]]]:
    """Seconds with and without memories, for each length of the prompt."""
    import torch

    from fairseq.hf.attention.wrapper import ExtendedMind

    mind = ExtendedMind(model, memory, topk=10, limit=None)
    times = {}
    for length in PROMPTS:
        ids = torch.randint(3, vocabulary, (1, length))
        with torch.inference_mode(), mind:
            times[length] = common.in_turn(lambda: model(ids), lambda: model(ids, topk=0), repeats)  # noqa: B023
    return times


def decode_times(model: Any, memory: Any, vocabulary: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of 20 decode steps after a prompt of 256 tokens, with and without memories."""
    import torch
    from transformers import DynamicCache

    from fairseq.hf.attention.wrapper import ExtendedMind

    ids = torch.randint(3, vocabulary, (1, 256))
    step = torch.full((1, 1), 5)

    def steps(topk: int) -> None:
        for _ in range(20):
            model(step, topk=topk, **{named: cache})
            cache.crop(-1)

    with torch.inference_mode(), ExtendedMind(model, memory, topk=10, limit=None):
        cache = DynamicCache()
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        model(ids, topk=0, **{named: cache})
        return common.in_turn(lambda: steps(10), lambda: steps(0), repeats)


def main() -> None:
    """Measure prompts and decode steps in turn with and without memories."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--vocabulary", type=int, default=32000, help="types of tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    import torch

    from fairseq.hf.attention.build import build_memory
    from fairseq.memory.extended_mind.settings import MindSettings

    torch.set_num_threads(options.threads)
    model = random_llama(options.hidden, options.heads, options.vocabulary)
    settings = MindSettings(limit=None, max_len=1024)
    ids = torch.randint(3, options.vocabulary, (1, DECODE_MEMORIES))
    few, many = (build_memory(model, ids[:, :count], settings=settings) for count in (PROMPT_MEMORIES, DECODE_MEMORIES))
    prompts = prompt_times(model, few, options.vocabulary, options.repeats)
    decode = decode_times(model, many, options.vocabulary, options.repeats)
    ratios = {length: common.median_ratio(*times) for length, times in prompts.items()}
    medians = {length: [statistics.median(side) for side in times] for length, times in prompts.items()}
    growth = medians[1024][0] / medians[256][0]
    details = {
        "prompts": {"ratios": ratios, "seconds": medians, "growth_256_to_1024": growth},
        "decode": {"ratio": common.median_ratio(*decode), "seconds": [statistics.median(x) / 20 for x in decode]},
        "model": [options.hidden, options.heads, options.vocabulary],
        "threads": options.threads,
    }
    what = "prompt of 1024 tokens with 4096 memories to one without"
    common.tell("extended_mind", what, ratios[1024], "<= 1.5", details, options.out)
    for length, (with_memories, without) in medians.items():
        sys.stdout.write(
            f"  {length}: {with_memories * 1e3:.1f} ms, {without * 1e3:.1f} ms without: {ratios[length]:.2f}\n"
        )
    sys.stdout.write(f"  256 to 1024 tokens: {growth:.2f} times as long (wanted: about 4)\n")
    with_memories, without = details["decode"]["seconds"]
    sys.stdout.write(
        f"  decode step with 16384 memories: {with_memories * 1e3:.2f} ms, {without * 1e3:.2f} ms without: "
        f"{details['decode']['ratio']:.2f} (wanted: <= 1.3)\n"
    )


if __name__ == "__main__":
    main()
