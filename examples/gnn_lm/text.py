"""Text for run.sh: python examples/gnn_lm/text.py FROM TO [--train-tokens N] [--eval-tokens N]

FROM holds train.txt, valid.txt and test.txt (or PREFIX.train.tokens and so on, as WikiText has them); TO gets the first
lines of each, up to so many words, and the train text's two halves as first.txt and second.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from fairseq.config import FlagParser, build, flag, require_at_least
from fairseq.runtime.atomic_files import write_atomically

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Options of the text."""

    folders: tuple[str, ...] = flag("folders")
    """Folder of the texts, and folder to write."""
    train_tokens: int = flag("--train-tokens", default=400_000)
    """Words and line ends of the train text that are kept; 0 keeps all."""
    eval_tokens: int = flag("--eval-tokens", default=0)
    """The same of valid and of test."""

    def __post_init__(self) -> None:
        if len(self.folders) != 2:
            raise ValueError(f"{len(self.folders)} folders are named; give the one of the texts and the one to write")
        require_at_least(0, train_tokens=self.train_tokens, eval_tokens=self.eval_tokens)


def find(folder: Path, split: str) -> Path:
    """The text of a split. Raises: ValueError when there is none, or more than one."""
    found = [path for pattern in (f"{split}.txt", f"*.{split}.tokens") for path in sorted(folder.glob(pattern))]
    if len(found) != 1:
        named = ", ".join(path.name for path in found) or "no such file"
        raise ValueError(f"{folder} needs one text of {split}, {split}.txt or NAME.{split}.tokens; it has {named}")
    return found[0]


def first_lines(lines: Sequence[str], num_tokens: int) -> list[str]:
    """Lines from the first on with at most so many words, the end of each line counted as one; 0 is all."""
    if not num_tokens:
        return list(lines)
    seen = 0

    def fits(line: str) -> bool:
        nonlocal seen
        seen += len(line.split()) + 1
        return seen <= num_tokens

    return list(takewhile(fits, lines))


def main(argv: Sequence[str]) -> None:
    """Write the texts."""
    parser = FlagParser("text.py", "Text for run.sh.")
    parser.add_config(TextConfig)
    config = build(TextConfig, parser.parse(argv))
    source, out = (Path(folder) for folder in config.folders)
    paths = {split: find(source, split) for split in SPLITS}
    out.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = first_lines(lines, config.train_tokens if split == "train" else config.eval_tokens)
        if not kept:
            raise ValueError(f"{path} has no line within the tokens asked for; give more, or 0 for all")
        parts = {split: kept}
        if split == "train":
            parts |= {"first": kept[: len(kept) // 2], "second": kept[len(kept) // 2 :]}
        for name, part in parts.items():
            write_atomically(out / f"{name}.txt", "".join(f"{line}\n" for line in part))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"text.py: error: {error}\n")
        sys.exit(2)
