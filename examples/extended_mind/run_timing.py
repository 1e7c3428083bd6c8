"""Seconds to answer several questions on one document: run_timing.py --base CONFIG.yaml [key=value ...]

Compares the document as memory, read before the first question, with the document in every prompt.
``out/timing.json`` gets the seconds after each question, ``out/timing.png`` shows them.

Source: arXiv 2406.02332, section 4.4.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planted_questions import articles
from settings import read_settings


def elapsed(ask: Any, count: int) -> list[float]:
    """Seconds since the beginning after each of ``count`` questions."""
    began = time.perf_counter()
    seconds = []
    for number in range(count):
        ask(number)
        seconds.append(time.perf_counter() - began)
    return seconds


def plot(seconds: Mapping[str, Sequence[float]], path: Path) -> None:
    """A line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in seconds.items():
        axes.plot(range(1, len(line) + 1), line, marker="o", label=name)
    axes.set(xlabel="questions answered", ylabel="seconds")
    axes.legend()
    figure.savefig(path)


def main(words: list[str]) -> None:
    """Time both ways, and write."""
    settings = read_settings(words, required=("model", "text", "out", "memory", "num_tokens", "n_queries", "question"))
    from experiments import greedy, load_model, write_results

    from fairseq.hf.attention.wrapper import ExtendedMind

    model, tokenizer = load_model(settings)
    text = Path(settings["text"]).read_text(encoding="utf-8")
    sentences = " ".join(sentence for _, article in articles(text) for sentence in article)
    ids = tokenizer(sentences)["input_ids"][: settings["num_tokens"]]
    document = tokenizer.decode(ids)
    questions = [f"{settings['question']} ({number})" for number in range(settings["n_queries"])]
    answer_tokens = settings.get("n_tokens", 10)
    greedy(model, tokenizer, questions[:1], 2)  # whatever is done once only
    mind = ExtendedMind(model, config=settings["memory"], tokenizer=tokenizer)

    def with_memory(number: int) -> None:
        if not mind.memories:
            mind.set_memory(ids)
        with mind:
            greedy(model, tokenizer, [questions[number]], answer_tokens)

    def with_prompt(number: int) -> None:
        greedy(model, tokenizer, [f"{document}\n\n{questions[number]}"], answer_tokens)

    seconds = {"in memory": elapsed(with_memory, len(questions)), "in the prompt": elapsed(with_prompt, len(questions))}
    out = Path(settings["out"])
    write_results(out / "timing.json", {"settings": settings, "seconds": seconds})
    plot(seconds, out / "timing.png")
    for name, line in seconds.items():
        sys.stdout.write(f"{name:>14}: first {line[0]:.2f} s, all {len(line)} {line[-1]:.2f} s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
