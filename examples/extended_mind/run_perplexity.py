"""Perplexity of long articles by how much of them is in reach: run_perplexity.py --base CONFIG.yaml [key=value ...]

The model reads ``seq_len_trained`` tokens at a time and is scored on the last ``stride`` of them; what stands before
them in the article, up to ``input_length`` tokens in all, is external memory, with the settings of each of ``memories``
in turn; where these are null the model reads all of it itself. Each of ``input_lengths`` is scored on the same tokens.
``out/perplexity.json`` gets the figures by article, ``out/perplexity.png`` shows them. A killed run goes on behind the
last article and memory it scored.

Source: arXiv 2406.02332, section 4.2.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planted_questions import articles
from settings import read_settings

Row = dict[str, Any]


def windows(num_tokens: int, trained: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token read, first scored, end) of each window; every token from the first whole window on is scored."""
    for scored in range(trained - stride, num_tokens, stride):
        stop = min(scored + stride, num_tokens)
        yield max(0, stop - trained), scored, stop


class Scorer:
    """Log-probabilities of an article's tokens, with the memory of a part of it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from experiments import load_model

        self.model, self.tokenizer = load_model(settings)

    def nll(
        self, ids: Any, memory: Mapping[str, Any] | None, lengths: Sequence[int], trained: int, stride: int
    ) -> dict[int, tuple[float, int]]:
        """For each input length the sum of -log p in nats, and of how many tokens.

        Without settings of a memory (None) the model reads all tokens in reach itself.
        """
        from fairseq.memory.hf.extended_mind import ExtendedMind

        mind = None if memory is None else ExtendedMind(self.model, **{"remove_special_ids": False, **memory})
        sums = {length: (0.0, 0) for length in lengths}
        for start, scored, stop in windows(len(ids), trained, stride):
            seen: dict[int, float] = {}
            for length in lengths:
                # Where an article has no more to give, lengths do not differ: one reading is enough.
                first = max(0, stop - length)
                if first in seen:
                    pass
                elif mind is None or first == start:
                    seen[first] = self._sum(ids[first:stop], stop - scored)
                else:
                    # Read from its own first token on: memories know nothing that is out of reach, and their first
                    # takes the attention that is for nothing, as the first token of any text does.
                    mind.set_memory(ids[first:start])
                    with mind:
                        seen[first] = self._sum(ids[start:stop], stop - scored)
                total, count = sums[length]
                sums[length] = total + seen[first], count + stop - scored
        return sums

    def _sum(self, ids: Any, scored: int) -> float:
        """-log p of the last tokens, in nats."""
        import torch

        ids = ids.to(self.model.device)
        with torch.inference_mode():
            logits = self.model(ids[None], logits_to_keep=scored + 1).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[-scored:], reduction="sum"))


def made_of(title: str, ids: Any, name: str, settings: Mapping[str, Any]) -> str:
    """Checksum of what an article's figures depend on: its tokens, and the settings that concern one memory."""
    names = ("model", "dtype", "input_lengths", "seq_len_trained", "stride")
    kept = {each: settings.get(each) for each in names} | {"memory": settings["memories"][name]}
    return f"{zlib.crc32(json.dumps([title, ids.tolist(), kept], sort_keys=True).encode()):08x}"


def chosen_articles(settings: Mapping[str, Any], tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Title and tokens of the first long articles."""
    import torch

    shortest = settings.get("min_tokens", max(settings["input_lengths"]))
    left = settings.get("num_articles") or math.inf
    for title, sentences in articles(Path(settings["text"]).read_text(encoding="utf-8")):
        ids = torch.tensor(tokenizer(" ".join(sentences))["input_ids"])
        if len(ids) >= shortest and left > 0:
            left -= 1
            yield title, ids[: settings.get("max_tokens")]


def table(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Perplexity by memory and input length, over all tokens of all articles."""
    found: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(row["memory"] for row in rows):
        mine = [row for row in rows if row["memory"] == name]
        count = sum(row["scored"] for row in mine)
        sums = {n: sum(row["nll"][n] * row["scored"] for row in mine) for n in mine[0]["nll"]}
        found[name] = {int(n): math.exp(total / count) for n, total in sums.items()}
    return found


def plot(perplexities: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """A line over the input lengths for each memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, by_length in perplexities.items():
        axes.plot(list(by_length), list(by_length.values()), marker="o", label=name)
    lengths = list(next(iter(perplexities.values())))
    axes.set(xscale="log", xlabel="tokens in reach (local and memory)", ylabel="perplexity")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def main(words: list[str]) -> None:
    """Score, and write."""
    needed = ("model", "text", "out", "memories", "input_lengths", "seq_len_trained", "stride")
    settings = read_settings(words, required=needed)
    from experiments import rows_so_far, write_results

    lengths, trained, stride = settings["input_lengths"], settings["seq_len_trained"], settings["stride"]
    if not 0 < stride < trained or min(lengths) < trained:
        sys.exit(
            f"error: stride {stride}, seq_len_trained {trained}, input_lengths {lengths}; each at least the one before"
        )
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    record = out / "articles.jsonl"
    known = {row["made_of"]: row for row in rows_so_far(record)}
    scorer = Scorer(settings)
    rows: list[Row] = []
    with open(record, "a", encoding="utf-8") as file:
        for title, ids in chosen_articles(settings, scorer.tokenizer):
            for name, memory in settings["memories"].items():
                key = made_of(title, ids, name, settings)
                if key not in known:
                    sums = scorer.nll(ids, memory, lengths, trained, stride)
                    row = {"title": title, "memory": name, "tokens": len(ids), "scored": sums[lengths[0]][1]}
                    row["nll"] = {str(n): total / count for n, (total, count) in sums.items()}
                    known[key] = row | {"made_of": key}
                    file.write(json.dumps(known[key]) + "\n")
                    file.flush()
                rows.append(known[key] | {"memory": name})
                figures = ", ".join(f"{n} {math.exp(x):.3f}" for n, x in rows[-1]["nll"].items())
                sys.stdout.write(f"{title}, {name}: {figures}\n")
                sys.stdout.flush()
    if not rows:
        sys.exit(f"error: no article of {settings['text']} is long enough; lower min_tokens")
    perplexities = table(rows)
    write_results(out / "perplexity.json", {"settings": settings, "perplexity": perplexities, "articles": rows})
    plot(perplexities, out / "perplexity.png")
    for name, by_length in perplexities.items():
        for length, perplexity in by_length.items():
            sys.stdout.write(f"{name}, {length} tokens in reach: perplexity {perplexity:.3f}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
