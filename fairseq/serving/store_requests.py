"""Requests about the stores: what there is, searches, and documents that are added and deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fairseq.serving.engine import Engine
from fairseq.serving.errors import ApiError
from fairseq.serving.fields import Body
from fairseq.serving.memories.minds import MindStore
from fairseq.serving.memories.neighbors import describe_rows
from fairseq.serving.memories.stores import ServedStore
from fairseq.serving.metrics import Metrics
from fairseq.serving.requests import RequestRules, SearchRequest, read_text

_MOST_DOCUMENTS = 256
"""In one request."""
Steps = Callable[[], Iterator[Any]]


class StoreRequests:
    """Answers them; what needs the model or changes a store is returned as steps for the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        rules: RequestRules,
        stores: Mapping[str, ServedStore],
        mind: MindStore | None,
        metrics: Metrics,
    ) -> None:
        self._engine, self._rules, self._metrics = engine, rules, metrics
        self._stores: dict[str, ServedStore | MindStore] = dict(stores)
        if mind is not None:
            self._stores[mind.name] = mind

    def all(self) -> list[dict[str, Any]]:
        """Facts about every store."""
        return [store.describe() for store in self._stores.values()]

    def show(self, name: str) -> dict[str, Any]:
        """Facts about one. Raises: ApiError where there is none of this name."""
        return self._named(name).describe()

    def document(self, name: str, number: int) -> dict[str, Any]:
        """A document as the store has it. Raises: ApiError for one that is unknown or deleted."""
        store, codec = self._named(name), self._rules.codec
        if isinstance(store, MindStore):
            ids = store.tokens_of(number)
        else:
            ids = store.store.values.take(store.rows_of(number)).tolist()
        text = None if codec.tokenizer is None else codec.decode(ids, special=True)
        return {"id": number, "store": name, "tokens": ids, "text": text}

    def search(self, wanted: SearchRequest) -> Steps:
        """Neighbours of a text's end or of keys, the closest first."""
        store = self._stores[wanted.store]
        assert isinstance(store, ServedStore)

        def steps() -> Iterator[Any]:
            memory = store.memory
            if wanted.keys:
                key_ND = torch.tensor(wanted.keys)
                if key_ND.shape[1] != store.store.dim:
                    raise ApiError(
                        400, f"keys have {key_ND.shape[1]} numbers, those of the store {store.store.dim}", param="keys"
                    )
            else:
                _, scores = self._engine.decoder.read(wanted.tokens)
                key_ND = scores.keys[memory.kind][:, -1].float().cpu()
            found = memory.with_k(wanted.k).neighbors(key_ND)
            results = []
            for ids_K, scores_K in zip(found.ids_NK, found.scores_NK):
                ids_M, scores_M = ids_K[ids_K >= 0], scores_K[ids_K >= 0]
                results.append(describe_rows(store.store, self._rules.codec, ids_M, scores_M, None, wanted.context))
            yield {"store": wanted.store, "results": results}

        return steps

    def add(self, name: str, body: Body) -> Steps:
        """Add the documents of a body: texts, or objects with a text or tokens. Raises: ApiError."""
        store = self._writable(name)
        given = body.items("documents", most=_MOST_DOCUMENTS)
        if given is None:
            body.fail("documents", "is missing")
        body.end()
        documents = [self._document_ids(each, f"documents[{number}]") for number, each in enumerate(given)]

        def steps() -> Iterator[Any]:
            numbers: list[int] = []
            for step in store.add(documents, self._engine.decoder):
                numbers = step
                yield None
            self._metrics.count(self._metrics.added, len(numbers), store=name)
            yield {"store": name, "documents": numbers}

        return steps

    def delete(self, name: str, number: int) -> Steps:
        """Delete a document. Raises: ApiError."""
        store = self._writable(name)

        def steps() -> Iterator[Any]:
            rows = store.delete(number)
            self._metrics.count(self._metrics.deleted, store=name)
            yield {"store": name, "id": number, "deleted_rows": rows}

        return steps

    def _document_ids(self, value: Any, path: str) -> list[int]:
        if isinstance(value, dict):
            body = Body(value, f"{path}.")
            stated = [body.take(field) for field in ("text", "tokens")]
            body.end()
            if sum(each is not None for each in stated) != 1:
                raise ApiError(400, f"{path} must have either text or tokens", param=path, code="invalid_value")
            value = stated[0] if stated[0] is not None else stated[1]
        ids = read_text(value, path, self._rules)
        if len(ids) < 2:
            raise ApiError(400, f"{path} has one token; a row is a token and what was before it", param=path)
        return ids

    def _named(self, name: str) -> ServedStore | MindStore:
        if name not in self._stores:
            known = ", ".join(self._stores) or "none"
            raise ApiError(404, f"there is no store {name!r}; the stores: {known}", code="store_not_found")
        return self._stores[name]

    def _writable(self, name: str) -> ServedStore | MindStore:
        store = self._named(name)
        if not store.describe()["writable"]:
            raise ApiError(403, f"store {name!r} is served to readers only; start the server with --writable")
        return store
