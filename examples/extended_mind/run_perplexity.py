"""Perplexity of long articles by how much of them is in reach: run_perplexity.py --base CONFIG.yaml [key=value ...]

The model reads ``seq_len_trained`` tokens at a time and is scored on the last ``stride`` of them, every ``step`` tokens
(all are scored by default). What stands before them in the article, up to ``input_length`` tokens in all, is external
memory, with the settings of each of ``memories`` in turn; where these are null the model reads all of it itself. Each
of ``input_lengths`` is scored on the same tokens. A memory is read as it is, or after the model's first token where its
settings have ``add_first_token: true``. ``out/perplexity.json`` gets the figures by article,
``out/perplexity.png`` shows them. A killed run goes on behind the last window it scored.

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


def windows(num_tokens: int, trained: int, stride: int, step: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(first token read, first scored, end) of each window, ``step`` apart.

    Without a step every token is scored from the first whole window on.
    """
    for scored in range(trained - stride, num_tokens, step or stride):
        stop = min(scored + stride, num_tokens)
        yield max(0, stop - trained), scored, stop


class Scorer:
    """Log-probabilities of parts of an article, with the memory of what stands before them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from experiments import load_model

        self.settings = settings
        self.model, self.tokenizer = load_model(settings)
        self._minds: dict[str, Any] = {}

    def sums(self, ids: Any, name: str, window: tuple[int, int, int]) -> dict[str, float]:
        """For each input length the sum of -log p of a window's scored tokens, in nats."""
        from fairseq.hf.attention.build import TextTokens

        start, scored, stop = window
        mind, seen = self._mind(name), {}
        add_first_token = (self.settings["memories"][name] or {}).get("add_first_token", False)
        for length in self.settings["input_lengths"]:
            # Where an article has no more to give, lengths do not differ: one reading is enough.
            first = max(0, stop - length)
            if first in seen:
                pass
            elif mind is None or first == start:
                seen[first] = self._sum(ids[first:stop], stop - scored)
            else:
                # Read from its own first token on: memories know nothing that is out of reach, and their first takes
                # the attention that is for nothing, as the first token of any text does.
                mind.set_memory(TextTokens(ids[first:start]) if add_first_token else ids[first:start])
                with mind:
                    seen[first] = self._sum(ids[start:stop], stop - scored)
        return {str(length): seen[max(0, stop - length)] for length in self.settings["input_lengths"]}

    def _mind(self, name: str) -> Any:
        from fairseq.hf.attention.wrapper import ExtendedMind

        memory = self.settings["memories"][name]
        if memory is not None and name not in self._minds:
            own = {each: value for each, value in memory.items() if each != "add_first_token"}
            mind = ExtendedMind(self.model, tokenizer=self.tokenizer, **{"remove_special_ids": False, **own})
            self._minds[name] = mind
        return self._minds.get(name)

    def _sum(self, ids: Any, scored: int) -> float:
        """-log p of the last tokens, in nats."""
        import torch

        ids = ids.to(self.model.device)
        with torch.inference_mode():
            logits = self.model(ids[None], logits_to_keep=scored + 1).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[-scored:], reduction="sum"))


def fingerprint(ids: Any, name: str, settings: Mapping[str, Any]) -> str:
    """Checksum of what an article's figures depend on: its tokens, and the settings that concern one memory."""
    names = ("model", "dtype", "input_lengths", "seq_len_trained", "stride", "step")
    kept = {each: settings.get(each) for each in names} | {"memory": settings["memories"][name]}
    return f"{zlib.crc32(json.dumps([ids.tolist(), kept], sort_keys=True).encode()):08x}"


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


def scored_articles(scorer: Scorer, record: Path) -> Iterator[Row]:
    """Perplexities of one article with one memory after the other; each window is recorded when it is scored."""
    from experiments import rows_so_far

    settings = scorer.settings
    known = {(row["made_of"], row["window"]): row["sums"] for row in rows_so_far(record)}
    with open(record, "a", encoding="utf-8") as file:
        for title, ids in chosen_articles(settings, scorer.tokenizer):
            sizes = (settings["seq_len_trained"], settings["stride"], settings.get("step"))
            places = list(windows(len(ids), *sizes))
            for name in settings["memories"]:
                key, totals = fingerprint(ids, name, settings), dict.fromkeys(map(str, settings["input_lengths"]), 0.0)
                for number, window in enumerate(places):
                    if (key, number) not in known:
                        known[key, number] = scorer.sums(ids, name, window)
                        row = {"made_of": key, "window": number, "sums": known[key, number]}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    totals = {length: total + known[key, number][length] for length, total in totals.items()}
                count = sum(stop - scored for _, scored, stop in places)
                nll = {length: total / count for length, total in totals.items()}
                yield {"title": title, "memory": name, "tokens": len(ids), "scored": count, "nll": nll}


def table(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Perplexity by memory and input length, over all tokens of all articles."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["memory"] for row in rows):
        mine = [row for row in rows if row["memory"] == name]
        count = sum(row["scored"] for row in mine)
        sums = {n: sum(row["nll"][n] * row["scored"] for row in mine) for n in mine[0]["nll"]}
        found[name] = {n: math.exp(total / count) for n, total in sums.items()}
    return found


def plot(perplexities: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A line over the input lengths for each memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, by_length in perplexities.items():
        axes.plot([int(length) for length in by_length], list(by_length.values()), marker="o", label=name)
    lengths = list(next(iter(perplexities.values())))
    axes.set(xscale="log", xlabel="tokens in reach (local and memory)", ylabel="perplexity")
    axes.set_xticks([int(length) for length in lengths], lengths)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def main(words: list[str]) -> None:
    """Score, and write."""
    needed = ("model", "text", "out", "memories", "input_lengths", "seq_len_trained", "stride")
    settings = read_settings(words, required=needed)
    from experiments import write_results

    lengths, trained, stride = settings["input_lengths"], settings["seq_len_trained"], settings["stride"]
    step = settings.get("step") or stride
    if not 0 < stride < trained or min(lengths) < trained or step < stride:
        sys.exit(
            f"error: stride {stride}, seq_len_trained {trained}, input_lengths {lengths}; each at least the one "
            f"before, and step {step} no shorter than stride"
        )
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in scored_articles(Scorer(settings), out / "windows.jsonl"):
        rows.append(row)
        figures = ", ".join(f"{length} {math.exp(nll):.3f}" for length, nll in row["nll"].items())
        sys.stdout.write(f"{row['title']}, {row['memory']}: {figures}\n")
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
