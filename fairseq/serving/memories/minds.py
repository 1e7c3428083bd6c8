"""Extended Mind's memory of a server: documents inside attention, added and deleted while the server runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq.hf.attention.build import TextTokens
from fairseq.hf.attention.wrapper import ExtendedMind
from fairseq.hf.decoding.rows import RowDecoder
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.storage import load_memory, save_memory
from fairseq.runtime.files import locked
from fairseq.serving.errors import ApiError


class MindStore:
    """One memory that all sequences attend to, and its file, if it was read from one of ours.

    Only the thread that runs the model may call the methods that change it.
    """

    kind = "extended_mind"

    def __init__(self, name: str, path: str, model: Any, tokenizer: Any, *, topk: int, writable: bool) -> None:
        """Read a memory that ``save_memory`` wrote, or the text of a file, and attach it to the model.

        Raises: ValueError when it is of another model, or a text and there is no tokenizer.
        """
        self.name, self.writable = name, writable
        self._path: Path | None = None
        self._mind = ExtendedMind(model, tokenizer=tokenizer, topk=topk)
        with contextlib.ExitStack() as until_open:
            if not path.endswith(".safetensors"):
                self._mind.set_memory(_text_of(path, tokenizer, writable=writable))
            else:
                self._path = Path(path)
                if writable:
                    until_open.enter_context(locked(Path(f"{path}.serving.lock"), f"memory {path!r}"))
                self._mind.set_memory(load_memory(path))
            until_open.enter_context(self._mind)
            self._closing = until_open.pop_all()

    def close(self) -> None:
        """Take the memory out of the model, and release the lock of its file."""
        self._closing.close()

    @property
    def memory(self) -> Memory:
        """The memory as it is now."""
        return self._mind.memories[0]

    def describe(self) -> dict[str, Any]:
        """Facts for clients."""
        memory = self.memory
        return {
            "name": self.name,
            "kind": self.kind,
            "memories": len(memory),
            "tokens": len(memory.token_N),
            "documents": len(memory.document_starts),
            "topk": self._mind.settings.topk,
            "writable": self.writable,
        }

    def tokens_of(self, document: int) -> list[int]:
        """Tokens of a document. Raises: ApiError for one that is unknown or deleted."""
        part = self._part(document)
        return [int(token) for token in self.memory.token_N[part]]

    def add(self, documents: Sequence[Sequence[int]], decoder: RowDecoder) -> Iterator[list[int]]:
        """Add documents, given as tokens; the only item is their numbers. They are on disk then."""
        first = len(self.memory.document_starts)
        before = self.memory
        try:
            texts: Any = [TextTokens(torch.tensor(list(ids))) for ids in documents]
            self._mind.add_memory(texts)
            self._save()
        except BaseException as error:
            self._mind.set_memory(before)
            if isinstance(error, ValueError):
                raise ApiError(400, f"nothing was added: {error}", param="documents") from error
            raise
        yield list(range(first, first + len(documents)))

    def delete(self, document: int) -> int:
        """Delete the memories of a document, whose number nothing else gets; returns how many there were."""
        part, before = self._part(document), self.memory
        keep_S = (before.place_S < part.start) | (before.place_S >= part.stop)
        if not bool(keep_S.any()):
            raise ApiError(400, f"document {document} is the last one; stop the server to remove it", param="id")
        self._mind.set_memory(before.only(keep_S))
        try:
            self._save()
        except BaseException:
            self._mind.set_memory(before)
            raise
        return int((~keep_S).sum())

    def _save(self) -> None:
        assert self._path is not None
        save_memory(self.memory, self._path)

    def _part(self, document: int) -> slice:
        memory = self.memory
        starts = [*memory.document_starts, len(memory.token_N)]
        if not 0 <= document < len(starts) - 1:
            raise ApiError(
                404,
                f"{self.name!r} has no document {document}; its documents are 0 to {len(starts) - 2}",
                param="id",
                code="document_not_found",
            )
        part = slice(starts[document], starts[document + 1])
        if not bool(((memory.place_S >= part.start) & (memory.place_S < part.stop)).any()):
            raise ApiError(
                404, f"document {document} of {self.name!r} was deleted", param="id", code="document_deleted"
            )
        return part


def _text_of(path: str, tokenizer: Any, *, writable: bool) -> str:
    """The text of a file. Raises: ValueError where a text is not enough, or the file holds none."""
    if writable:
        raise ValueError(
            f"--extended-mind {path} is a text, and --writable keeps changes in a memory's file; save one "
            "(ExtendedMind.save_memory) and name it, or drop --writable"
        )
    if tokenizer is None:
        raise ValueError(f"--extended-mind {path} is a text, and the model has no tokenizer; name a saved memory")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--extended-mind {path} is neither a memory (.safetensors) nor UTF-8 text") from None
