"""LibreOffice's interface in German and English as pairs of sentences, for a model of another text: domain.sh calls it.

    python examples/translation/libreoffice.py FOLDER --messages DEB_OR_FOLDER --codes CODE

DEB_OR_FOLDER is Debian's package libreoffice-l10n-de (``apt-get download`` fetches it) or a folder of .mo files.
Writes train, valid and test .de and .en in FOLDER, in the word pieces of CODE. No pair, and no German side, of valid or
test is in train.
"""

from __future__ import annotations

import gettext
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq.config import FlagParser, build, flag
from fairseq.data.corpora import parallel


@dataclass(frozen=True, kw_only=True)
class LibreOfficeConfig:
    """Where the texts come from and go to."""

    folder: str = flag("folder")
    """Where the texts go."""
    messages: str = flag("--messages")
    """Debian package, or folder of .mo files."""
    codes: str = flag("--codes")
    """Merges of the model's word pieces."""


_HELD_OUT = 1000  # sentences of valid, and of test


def messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Pairs (German, English) of all message files, as plain text. Raises: ValueError when there are none."""
    files = sorted(folder.rglob("*.mo"))
    if not files:
        raise ValueError(f"{folder} holds no .mo file; give Debian's package libreoffice-l10n-de or a folder of them")
    for path in files:
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for english, german in catalog.items():
            if english and isinstance(english, str):  # not the header, nor plurals
                yield plain(german), plain(english.rpartition("\x04")[2])


def plain(message: str) -> str:
    """A message without the marks of keyboard shortcuts, in one line."""
    return " ".join(re.sub(r"[~_](?=\w)", "", message).split())


def split_pairs(pairs: Iterator[tuple[str, str]]) -> dict[str, parallel.Pairs]:
    """Different pairs of at least two words and at most 240 characters; the German digest decides the split."""
    kept = {pair for pair in pairs if min(len(side.split()) for side in pair) > 1 and max(map(len, pair)) <= 240}
    order = sorted(kept, key=lambda pair: (hashlib.sha256(pair[0].encode()).digest(), pair))
    sources = list(dict.fromkeys(source for source, _ in order))
    valid, test = set(sources[:_HELD_OUT]), set(sources[_HELD_OUT : 2 * _HELD_OUT])
    found: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for pair in order:
        found["valid" if pair[0] in valid else "test" if pair[0] in test else "train"].append(pair)
    return dict(found)


def main(argv: Sequence[str]) -> None:
    """Write the texts."""
    parser = FlagParser("libreoffice.py", "LibreOffice's interface as pairs of sentences.")
    parser.add_config(LibreOfficeConfig)
    config = build(LibreOfficeConfig, parser.parse(argv))
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(config.messages)
        if source.is_file():
            subprocess.run(["dpkg-deb", "--extract", str(source), temporary], check=True)
            source = Path(temporary)
        parallel.prepare(parallel.MULTI30K, split_pairs(messages(source)), Path(config.folder), Path(config.codes))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"libreoffice.py: error: {error}\n")
        sys.exit(2)
