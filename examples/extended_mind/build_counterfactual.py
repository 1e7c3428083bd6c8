"""Replace the facts that are asked for everywhere in their documents: build_counterfactual.py --base CONFIG.yaml

Settings (in the file, or as key=value): ``questions`` (JSON lines with document, question, answer), ``edits`` (JSON:
answer -> replacement), ``tokenizer`` (a folder; lengths are in its tokens), ``splits`` (largest length of each split),
``out`` (a folder). Each split becomes ``counterfactual_SPLIT.jsonl``. A question whose answer has no edit, or whose
document does not hold its answer, is left out, and counted.

Source: arXiv 2406.02332, section 4.1.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from settings import read_settings


def edited(text: str, answer: str, replacement: str) -> tuple[str, int]:
    """The text with another answer in every place, whatever the case; and in how many."""
    return re.subn(re.escape(answer), lambda _: replacement, text, flags=re.IGNORECASE)


def split_of(length: int, splits: Sequence[int]) -> str | None:
    """Name of the first split that a length fits in; None when it is longer than all."""
    return next((name_of(size) for size in sorted(splits) if length <= size), None)


def name_of(size: int) -> str:
    """``2k`` for 2048 and 2000."""
    return f"{round(size / 1000)}k" if size >= 1000 else str(size)


def counterfactual(rows: Sequence[Mapping[str, str]], edits: Mapping[str, str]) -> list[dict[str, object]]:
    """Questions about one document, in which all their answers are edited; those without an edit are left out."""
    document, made = rows[0]["document"], []
    times = {}
    for answer in dict.fromkeys(row["answer"] for row in rows if row["answer"] in edits):
        document, times[answer] = edited(document, answer, edits[answer])
    for row in rows:
        answer = row["answer"]
        if times.get(answer):
            question = edited(row["question"], answer, edits[answer])[0]
            more = {"true_answer": answer, "appearances": times[answer]}
            made.append(dict(row) | {"document": document, "question": question, "answer": edits[answer]} | more)
    return made


def main(words: list[str]) -> None:
    """Write the splits."""
    settings = read_settings(words, required=("questions", "edits", "tokenizer", "splits", "out"))
    from experiments import json_lines
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    edits = json.loads(Path(settings["edits"]).read_text(encoding="utf-8"))
    splits: dict[str, list[str]] = {name_of(size): [] for size in sorted(settings["splits"])}
    left_out: Counter[str] = Counter()
    by_document: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in json_lines(Path(settings["questions"])):
        by_document[row["document"]].append(row)
    for rows in by_document.values():
        made = counterfactual(rows, edits)
        left_out["without an edit, or without the answer in the document"] += len(rows) - len(made)
        if not made:
            continue
        length = len(tokenizer(made[0]["document"])["input_ids"])
        split = split_of(length, settings["splits"])
        if split is None:
            left_out["longer than the longest split"] += len(made)
        else:
            splits[split] += [json.dumps(row | {"tokens": length}) for row in made]
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (out / f"counterfactual_{name}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        sys.stdout.write(f"{name}: {len(rows)} questions\n")
    for reason, count in (+left_out).items():
        sys.stdout.write(f"left out, {reason}: {count}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
