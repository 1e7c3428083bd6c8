"""Accuracy of answers about documents, by where the document is: run_retrieval.py --base CONFIG.yaml [key=value ...]

Modes (setting ``modes``): ``none`` (the question alone), ``document`` (the document in the prompt), ``chunks`` (the
pieces of it that BM25 finds for the question, in the prompt, the best last), each name of ``memories`` (the document as
external memory, with these settings), and such a name with ``+chunks``. Answers are decoded greedily; an answer counts
where the expected one stands in it. ``out/retrieval.json`` gets every answer and accuracies by split with 95 %
confidence intervals, ``out/retrieval.png`` shows them. A killed run goes on where it was.

Source: arXiv 2406.02332, section 4.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from settings import read_settings

Row = dict[str, Any]


def chunks_for(questions: Sequence[str], document: str, tokenizer: Any, size: int, count: int) -> list[list[str]]:
    """For each question the pieces of a document that BM25 finds best, the best last."""
    import bm25s

    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids), size)]
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(pieces, show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(questions), show_progress=False)
    found, _ = retriever.retrieve(words, k=min(count, len(pieces)), show_progress=False)
    return [[pieces[number] for number in row[::-1]] for row in found]


def topk_for(settings: Mapping[str, Any], memory: Mapping[str, Any], num_memories: int) -> int:
    """The paper's rule: one memory per 500, at least 4 and at most 12; or the fixed number."""
    if settings.get("dynamic_topk"):
        return min(12, max(4, round(num_memories / 500)))
    return int(memory.get("topk", 10))


class Retrieval:
    """Asks a model the questions of one document at a time."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from experiments import context_of, load_model

        self.settings = settings
        self.model, self.tokenizer = load_model(settings)
        self.room = context_of(self.model) - int(settings["n_tokens"])

    def prompt(self, row: Row, context: str) -> str:
        """What the model reads; with ``chat`` as a user's message."""
        text = self.settings["prompt"].format(context=context, question=row["question"]).strip()
        if self.settings.get("chat"):
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return str(text) + self.settings.get("answer_start", "").format(stem=row.get("stem", ""))

    def answers(self, mode: str, rows: Sequence[Row]) -> list[str]:
        """The model's answers to questions on one document."""
        from experiments import greedy

        from fairseq.hf.attention.wrapper import ExtendedMind

        document, num_tokens = rows[0]["document"], int(self.settings["n_tokens"])
        contexts = [""] * len(rows)
        if mode == "document":
            # What does not fit is cut off at the end, as any use of a short context would.
            empty = max(len(self.tokenizer(self.prompt(row, ""))["input_ids"]) for row in rows)
            ids = self.tokenizer(document, add_special_tokens=False)["input_ids"][: self.room - empty - 8]
            contexts = [self.settings["context"].format(text=self.tokenizer.decode(ids))] * len(rows)
        elif mode.endswith("chunks"):
            size, count = int(self.settings["chunk_tokens"]), int(self.settings["num_chunks"])
            found = chunks_for([row["question"] for row in rows], document, self.tokenizer, size, count)
            contexts = [self.settings["context"].format(text="\n".join(pieces)) for pieces in found]
        prompts = [self.prompt(row, context) for row, context in zip(rows, contexts)]
        memory = self.settings["memories"].get(mode.removesuffix("+chunks"))
        if memory is None:
            return greedy(self.model, self.tokenizer, prompts, num_tokens)
        text = self.settings["memory_text"].format(text=document)
        add_first_token = memory.get("add_first_token", True)
        config = {name: value for name, value in memory.items() if name != "add_first_token"}
        mind = ExtendedMind(self.model, text, tokenizer=self.tokenizer, config=config, add_first_token=add_first_token)
        with mind:
            topk = topk_for(self.settings, memory, len(mind.memories[0]))
            return greedy(self.model, self.tokenizer, prompts, num_tokens, topk=topk)


def questions(folder: Path, limit: int | None) -> Iterator[tuple[str, list[Row]]]:
    """(split, questions on one document), document by document."""
    from experiments import json_lines

    for file in sorted(folder.glob("counterfactual_*.jsonl")):
        rows = json_lines(file)[:limit]
        groups = groupby(rows, key=lambda row: row["document"])
        yield from ((file.stem.partition("_")[2], list(group)) for _, group in groups)


def fingerprint(row: Row, mode: str, settings: Mapping[str, Any]) -> str:
    """Checksum of what an answer depends on beside its question: its document, and the settings of its mode."""
    elsewhere = ("data", "out", "modes", "limit", "memories")
    kept = {name: value for name, value in settings.items() if name not in elsewhere}
    kept["memory"] = settings["memories"].get(mode.removesuffix("+chunks"))
    return f"{zlib.crc32((row['document'] + json.dumps(kept, sort_keys=True)).encode()):08x}"


def table(done: Sequence[Row]) -> list[Row]:
    """Accuracy by mode and split, and by mode."""
    from experiments import wilson

    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in done:
        counts[row["mode"], row["split"]].append(row["correct"])
        counts[row["mode"], "all"].append(row["correct"])
    lines = []
    for (mode, split), correct in counts.items():
        low, high = wilson(sum(correct), len(correct))
        share = sum(correct) / len(correct)
        line = {"mode": mode, "split": split, "questions": len(correct)}
        lines.append(line | {"accuracy": share, "low": low, "high": high})
    return lines


def plot(lines: Sequence[Row], path: Path) -> None:
    """Bars with their intervals."""
    from matplotlib.figure import Figure

    splits, modes = ([*dict.fromkeys(line[name] for line in lines)] for name in ("split", "mode"))
    figure = Figure(figsize=(2 + 1.6 * len(splits), 4), layout="constrained")
    axes = figure.subplots()
    for number, mode in enumerate(modes):
        mine = {line["split"]: line for line in lines if line["mode"] == mode}
        at = [i + (number - len(modes) / 2 + 0.5) * 0.8 / len(modes) for i, split in enumerate(splits) if split in mine]
        heights = [line["accuracy"] for line in mine.values()]
        below = [line["accuracy"] - line["low"] for line in mine.values()]
        above = [line["high"] - line["accuracy"] for line in mine.values()]
        axes.bar(at, heights, 0.8 / len(modes), yerr=[below, above], capsize=3, label=mode)
    axes.set(xlabel="length of the document (tokens)", ylabel="accuracy", ylim=(0, 1))
    axes.set_xticks(range(len(splits)), splits)
    axes.legend()
    figure.savefig(path)


def main(words: list[str]) -> None:
    """Ask, score, and write."""
    settings = read_settings(words, required=("model", "data", "out", "modes", "memories", "prompt", "n_tokens"))
    from experiments import is_correct, rows_so_far, write_results

    known_modes = {"none", "document", "chunks", *settings["memories"]} | {
        f"{name}+chunks" for name in settings["memories"]
    }
    unknown = set(settings["modes"]) - known_modes
    if unknown:
        sys.exit(f"error: unknown mode {min(unknown)!r}; known: {', '.join(sorted(known_modes))}")
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    record = out / "answers.jsonl"
    names = ("split", "mode", "made_of", "question")
    known = {tuple(row.get(name) for name in names): row for row in rows_so_far(record)}
    done = []
    retrieval = Retrieval(settings)
    with open(record, "a", encoding="utf-8") as file:
        for split, rows in questions(Path(settings["data"]), settings.get("limit")):
            for mode in settings["modes"]:
                keys = [(split, mode, fingerprint(row, mode, settings), row["question"]) for row in rows]
                done += [known[key] for key in keys if key in known]
                left = [row for row, key in zip(rows, keys) if key not in known]
                if not left:
                    continue
                began = time.perf_counter()
                answers = retrieval.answers(mode, left)
                seconds = (time.perf_counter() - began) / len(left)
                for row, answer in zip(left, answers):
                    line = {"split": split, "mode": mode, "said": answer, "correct": is_correct(row["answer"], answer)}
                    line |= {key: row.get(key) for key in ("title", "question", "answer", "appearances", "tokens")}
                    line |= {"made_of": fingerprint(row, mode, settings), "seconds": round(seconds, 2)}
                    done.append(line)
                    file.write(json.dumps(line) + "\n")
                file.flush()
    lines = table(done)
    write_results(out / "retrieval.json", {"settings": settings, "accuracy": lines, "answers": done})
    plot(lines, out / "retrieval.png")
    for line in lines:
        sys.stdout.write(
            f"{line['mode']:>14} {line['split']:>5}: {line['accuracy']:.3f} ({line['low']:.3f} to {line['high']:.3f}), "
            f"{line['questions']} questions\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
