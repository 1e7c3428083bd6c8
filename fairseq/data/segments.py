"""Texts as a JSON file of segments, the form pyserini's JsonCollection reads.

The file is a list of ``{"id": "0", "contents": "text"}`` in corpus order; ids are positions. Those of sentences are
numbers, as TRIME's program for translation writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.data.dictionary import Dictionary
from fairseq.runtime.atomic_files import writing

_CHUNK_CHARS = 1 << 22
_WRITERS = "--output-segments-to-file (translation: --output-samples-to-file)"
_BETWEEN = re.compile(r"[\s,]*")


def write_segments(
    path: str | os.PathLike[str], blocks: Iterable[npt.NDArray[np.integer[Any]]], dictionary: Dictionary
) -> int:
    """Write the text of each block, as :func:`write_texts` does; returns their number."""
    return write_texts(path, map(dictionary.string, blocks), str)


def write_texts(path: str | os.PathLike[str], texts: Iterable[str], make_id: Callable[[int], str | int]) -> int:
    """Write texts, each with the id of its position, under a temporary name first; returns their number.

    No other file remains in the folder: pyserini reads all of its files.
    """
    count = 0
    with writing(path) as file:
        file.write("[")
        for count, text in enumerate(texts, start=1):
            segment = {"id": make_id(count - 1), "contents": text}
            file.write(("\n" if count == 1 else ",\n") + json.dumps(segment, ensure_ascii=False))
        file.write("\n]\n")
    return count


def read_segments(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the texts in order, keeping only a few of them in memory.

    Raises: ValueError when the file is not a list of segments, or an id is not its segment's position.
    """
    for position, item in enumerate(_items(path)):
        if not isinstance(item, dict) or not isinstance(item.get("contents"), str) or "id" not in item:
            raise ValueError(
                f'{os.fspath(path)}: item {position} is not a segment {{"id": ..., "contents": ...}}; '
                f"write the file with train.py {_WRITERS}"
            )
        if str(item["id"]) != str(position):
            raise ValueError(
                f"{os.fspath(path)}: segment {position} has the id {item['id']!r}, ids must be positions in corpus "
                "order, by which batches find their blocks; write it again with train.py "
                f"{_WRITERS}"
            )
        yield item["contents"]


def _items(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The objects of a JSON list (or of one JSON object per line), decoded as the file is read."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8") as file:
        text = file.read(_CHUNK_CHARS)
        offset = len(text) - len(text.lstrip())
        is_list = text.startswith("[", offset)
        offset += is_list
        while True:
            offset = _BETWEEN.match(text, offset).end()  # type: ignore[union-attr]
            if is_list and text.startswith("]", offset):
                return
            try:
                item, offset = decode(text, offset)
            except ValueError as error:
                # The object continues beyond the text read so far, or is malformed: more of the file decides.
                next_text = file.read(max(_CHUNK_CHARS, len(text) - offset))
                if not next_text:
                    if offset == len(text) and not is_list:
                        return
                    raise ValueError(f"{os.fspath(path)} is cut off or not JSON ({error}); write it again") from None
                text, offset = text[offset:] + next_text, 0
                continue
            yield item


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
