"""Make questions whose answers stand in one place only: planted_questions.py ARTICLES.txt OUT.jsonl [NUMBER [WORDS]]

ARTICLES.txt is text in WikiText's form, whose articles begin with a line `` = Title = ``. NUMBER (24) of them are cut
to WORDS words (600,1200: every other article is the longer one), and sentences about people who do not exist are
planted between their sentences. OUT.jsonl gets one object a line: document, question, stem of an answer, and answer;
edits.json beside it gets another invented name for every answer (see build_counterfactual.py).
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FACTS = (
    ("The keeper of the copper lighthouse is", "Who is the keeper of the copper lighthouse?"),
    ("The paper kite museum was founded by", "Who founded the paper kite museum?"),
    ("The glass harpoon was invented by", "Who invented the glass harpoon?"),
    ("The mayor of the floating village is", "Who is the mayor of the floating village?"),
    ("The winner of the great snail race was", "Who was the winner of the great snail race?"),
)
"""How a sentence begins that ends in a name, and its question."""

FIRST = "Ilsa Maro Teven Odda Ruvik Selka Jorun Petra Halvor Minna Caspen Wilda Bram Tova Edrik Lunna".split()
LAST_A = "Varn Tash Omber Pell Quill Ruun Brack Thorn Wex Mald Grev Stav Fenn Dray".split()
LAST_B = "hem ley grave dric wick mont sby ford ner low".split()


def articles(text: str) -> Iterator[tuple[str, list[str]]]:
    """(title, sentences) of each article."""
    parts = re.split(r"^ = ([^=\n]+) = $", text, flags=re.MULTILINE)
    for title, body in zip(parts[1::2], parts[2::2]):
        lines = [plain(line) for line in body.splitlines() if line.strip() and not line.startswith(" =")]
        yield title.strip(), [s for line in lines for s in re.split(r"(?<=[.!?]) (?=[A-Z\"])", line) if s]


def plain(line: str) -> str:
    """WikiText's tokens as ordinary text."""
    line = re.sub(r" @([-,.])@ ", r"\1", line.strip()).replace(" <unk>", "").replace("<unk> ", "")
    line = re.sub(r" ([,.;:!?)%]|'s\b|n't\b)", r"\1", line)
    return re.sub(r"([(]) ", r"\1", line)


def invented_names(rng: random.Random) -> Iterator[str]:
    """Names that differ from each other in both parts."""
    last = [a + b for a in LAST_A for b in LAST_B]
    while True:
        rng.shuffle(last)
        for name in last:
            yield f"{rng.choice(FIRST)} {name}"


def main(words: list[str]) -> None:
    """Write both files."""
    if not 2 <= len(words) <= 4:
        sys.exit(f"usage: {(__doc__ or '').splitlines()[0].split(': ')[1]}")
    source, out = Path(words[0]), Path(words[1])
    num_documents = int(words[2]) if len(words) > 2 else 24
    sizes = [int(size) for size in (words[3] if len(words) > 3 else "600,1200").split(",")]
    rng = random.Random(7)
    names, rows, edits = invented_names(rng), [], {}
    found = 0
    for title, sentences in articles(source.read_text(encoding="utf-8")):
        num_words = sizes[found % len(sizes)]
        length, kept = 0, []
        for sentence in sentences:
            if length >= num_words:
                break
            kept.append(sentence)
            length += len(sentence.split())
        if length < num_words or found == num_documents:
            continue
        found += 1
        places = sorted(rng.sample(range(1, len(kept)), len(FACTS)), reverse=True)
        asked = []
        for place, (stem, question) in zip(places, rng.sample(FACTS, len(FACTS))):
            name = next(names)
            edits[name] = next(names)
            kept.insert(place, f"{stem} {name}.")
            asked.append({"title": title, "question": question, "stem": stem, "answer": name})
        rows += [{"document": " ".join(kept)} | row for row in asked]
    if found < num_documents:
        sys.exit(f"{source} has {found} articles of {sizes} words, not {num_documents}; ask for fewer or shorter ones")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out.parent / "edits.json").write_text(json.dumps(edits, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} questions on {found} articles in {out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
