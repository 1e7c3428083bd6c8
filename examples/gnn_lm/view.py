"""The neighbours of some tokens, in their texts: python examples/gnn_lm/view.py STORES DICT [--split test] [--first N]

For each token its nearest train positions, with the cosine of the two states, and the text around each. The token that
a state predicts is in brackets; a star marks a neighbour that is the same token. --window draws bars around what the
graph's layers read of a neighbour.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq.config import FlagParser, build, flag, require_at_least
from fairseq.data.dictionary import Dictionary
from fairseq.memory.datastore import Datastore
from fairseq.memory.gnn.neighbors import SplitNeighbors
from fairseq.runtime.atomic_files import write_atomically


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Options of the view."""

    places: tuple[str, ...] = flag("places")
    """Folder of the stores, and the dictionary."""
    split: str = flag("--split", default="test")
    """Split of the tokens."""
    first: int = flag("--first", default=0)
    """First of the tokens, counted from 0."""
    tokens: int = flag("--tokens", default=0)
    """Tokens to show; 0 shows them up to the end of the line."""
    ranks: int = flag("--ranks", default=4)
    """Neighbours of each."""
    around: int = flag("--around", default=6)
    """Tokens of text before a neighbour; half as many after it."""
    window: int = flag("--window", default=0)
    """Positions that the layers read to each side of a neighbour; 0 draws no bars."""
    out: str | None = flag("--out", default=None)
    """File for the text, beside the screen."""

    def __post_init__(self) -> None:
        if len(self.places) != 2:
            raise ValueError(f"{len(self.places)} places are named; give the folder of the stores and dict.txt")
        require_at_least(0, first=self.first, tokens=self.tokens, window=self.window, around=self.around)
        require_at_least(1, ranks=self.ranks)


def words(store: Datastore, row: int, config: ViewConfig, dictionary: Dictionary, window: int | None = None) -> str:
    """The text around a row, its token in brackets and the window between bars."""
    before, after = config.around, max(config.around // 2, window or 0)
    token_C = store.context(torch.tensor([row]), before=before, after=after)[0].tolist()
    shown = ["" if token < 0 else dictionary[token] for token in token_C]
    shown[before] = f"[{shown[before]}]"
    if window is not None:
        first, last = max(0, before - window), min(len(shown) - 1, before + window)
        shown[first], shown[last] = f"| {shown[first]}", f"{shown[last]} |"
    return " ".join(word for word in shown if word)


def view(config: ViewConfig) -> Iterator[str]:
    """The lines. Raises: ValueError when a file is missing or no such token is there."""
    stores, dictionary = Path(config.places[0]), Dictionary.load(config.places[1])
    train, split = (Datastore.open(str(stores / name)) for name in ("train", config.split))
    train.require(dictionary_digest=dictionary.digest(), dictionary_size=len(dictionary))
    neighbors = SplitNeighbors.open(stores / f"{config.split}.neighbors", train=train, num_tokens=len(split))
    if config.first >= len(split):
        raise ValueError(f"--first {config.first} is beyond the {len(split)} tokens of {config.split}")
    row = config.first
    while row < len(split):
        value = int(split.values.take(torch.tensor([row])))
        yield f"token {row}: {words(split, row, config, dictionary)}"
        found = neighbors.take(torch.tensor([row]), min(config.ranks, neighbors.k))[0]
        found = found[found >= 0]
        key, key_KD = split.keys.take(torch.tensor([row])).float(), train.keys.take(found).float()
        cosine_K = torch.nn.functional.cosine_similarity(key, key_KD)
        same_K = train.values.take(found) == value
        for rank, (place, cosine, same) in enumerate(zip(found.tolist(), cosine_K.tolist(), same_K.tolist()), 1):
            text = words(train, place, config, dictionary, config.window or None)
            yield f"  {'*' if same else ' '} {rank} {cosine:.3f} train {place}: {text}"
        row += 1
        if row - config.first == config.tokens or (not config.tokens and value == dictionary.eos()):
            return


def main(argv: Sequence[str]) -> None:
    """Print the neighbours."""
    parser = FlagParser("view.py", "The neighbours of some tokens, in their texts.")
    parser.add_config(ViewConfig)
    config = build(ViewConfig, parser.parse(argv))
    text = "".join(f"{line}\n" for line in view(config))
    if config.out:
        write_atomically(Path(config.out), text)
    sys.stdout.write(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"view.py: error: {error}\n")
        sys.exit(2)
