"""Perplexity of long articles by how much of them is in reach: run_perplexity.py --base CONFIG.yaml [key=value ...]

The model reads ``seq_len_trained`` tokens at a time and is scored on the last ``stride`` of them; what stands before
them in the article, up to ``input_length`` tokens in all, is external memory. Each of ``input_lengths`` is scored on
the same tokens. ``out/perplexity.json`` gets the figures by article, ``out/perplexity.png`` shows them.

Source: arXiv 2406.02332, section 4.2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planted_questions import articles
from settings import read_settings


def windows(num_tokens: int, trained: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token read, first scored, end) of each window; every token from the first whole window on is scored."""
    for scored in range(trained - stride, num_tokens, stride):
        stop = min(scored + stride, num_tokens)
        yield max(0, stop - trained), scored, stop


class Scorer:
    """Log-probabilities of an article's tokens, with the memory of a part of it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from experiments import load_model

        self.settings = settings
        self.model, self.tokenizer = load_model(settings)

    def nll(self, ids: Any, lengths: Sequence[int], trained: int, stride: int) -> dict[int, tuple[float, int]]:
        """For each input length the sum of -log p in nats, and of how many tokens."""
        import torch

        from fairseq.memory.hf.extended_mind import ExtendedMind

        mind = ExtendedMind(self.model, ids, config=self.settings["memory"] | {"remove_special_ids": False})
        whole = mind.memories[0]
        sums = {length: (0.0, 0) for length in lengths}
        for start, scored, stop in windows(len(ids), trained, stride):
            source, seen = ids[None, start:stop].to(self.model.device), {}
            for length in lengths:
                # Where an article has no more to give, lengths do not differ: one reading is enough.
                first = max(0, stop - length)
                if first not in seen:
                    mind.set_memory(whole.only((whole.place_S >= first) & (whole.place_S < start)))
                    with torch.inference_mode(), mind:
                        logits = self.model(source).logits[0, scored - start - 1 : -1].float()
                    seen[first] = float(
                        torch.nn.functional.cross_entropy(logits, source[0, scored - start :], reduction="sum")
                    )
                total, count = sums[length]
                sums[length] = total + seen[first], count + stop - scored
        return sums


def plot(perplexities: Mapping[int, float], path: Path) -> None:
    """A line over the input lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(perplexities), list(perplexities.values()), marker="o")
    axes.set(xscale="log", xlabel="tokens in reach (local and memory)", ylabel="perplexity")
    axes.set_xticks(list(perplexities), [str(length) for length in perplexities])
    figure.savefig(path)


def main(words: list[str]) -> None:
    """Score, and write."""
    needed = ("model", "text", "out", "memory", "input_lengths", "seq_len_trained", "stride")
    settings = read_settings(words, required=needed)
    import torch
    from experiments import write_results

    lengths, trained, stride = settings["input_lengths"], settings["seq_len_trained"], settings["stride"]
    if not 0 < stride < trained or min(lengths) < trained:
        sys.exit(
            f"error: stride {stride}, seq_len_trained {trained}, input_lengths {lengths}; each at least the one before"
        )
    scorer = Scorer(settings)
    rows: list[dict[str, Any]] = []
    text = Path(settings["text"]).read_text(encoding="utf-8")
    for title, sentences in articles(text):
        ids = torch.tensor(scorer.tokenizer(" ".join(sentences))["input_ids"])[: settings.get("max_tokens")]
        if len(ids) < settings.get("min_tokens", max(lengths)) or len(rows) == settings.get("num_articles"):
            continue
        sums = scorer.nll(ids, lengths, trained, stride)
        rows.append(
            {"title": title, "tokens": len(ids), "nll": {n: total / count for n, (total, count) in sums.items()}}
        )
        rows[-1]["scored"] = next(iter(sums.values()))[1]
        sys.stdout.write(f"{title}: " + ", ".join(f"{n} {math.exp(x):.3f}" for n, x in rows[-1]["nll"].items()) + "\n")
        sys.stdout.flush()
    if not rows:
        sys.exit(f"error: no article of {settings['text']} is long enough; lower min_tokens")
    count = sum(row["scored"] for row in rows)
    mean = {n: sum(row["nll"][n] * row["scored"] for row in rows) / count for n in lengths}
    perplexities = {n: math.exp(x) for n, x in mean.items()}
    out = Path(settings["out"])
    write_results(out / "perplexity.json", {"settings": settings, "perplexity": perplexities, "articles": rows})
    plot(perplexities, out / "perplexity.png")
    for length, perplexity in perplexities.items():
        sys.stdout.write(f"{length:>8} tokens in reach: perplexity {perplexity:.4f} ({count} tokens)\n")


if __name__ == "__main__":
    main(sys.argv[1:])
