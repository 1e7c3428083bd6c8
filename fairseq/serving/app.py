"""The HTTP interface: routes, and how each request reaches the engine and becomes an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fairseq.serving.answers import AnswerForm
from fairseq.serving.engine import Engine
from fairseq.serving.errors import ApiError
from fairseq.serving.fields import Body
from fairseq.serving.jobs import ChoiceEnd, Failure, GenerationJob, Mailbox, Outcome, TaskJob, TokenEvent
from fairseq.serving.memories.minds import MindStore
from fairseq.serving.memories.neighbors import describe_found
from fairseq.serving.memories.stores import ServedStore
from fairseq.serving.metrics import CONTENT_TYPE, Metrics
from fairseq.serving.requests import Asked, RequestRules, read_chat, read_completion, read_search
from fairseq.serving.store_requests import StoreRequests

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""Answered without the token: what watches a server need not know it."""
Handler = Callable[[Request], Awaitable[Response]]


class ApiServer:
    """Answers requests with an engine; ``app`` is the ASGI application."""

    def __init__(
        self,
        engine: Engine,
        rules: RequestRules,
        stores: Mapping[str, ServedStore],
        mind: MindStore | None,
        metrics: Metrics,
        *,
        max_body: int,
    ) -> None:
        """Args.

        stores: by name.
        mind: memories inside attention, if any.
        max_body: bytes of a request.
        """
        self.engine, self.rules, self.stores, self.metrics = engine, rules, stores, metrics
        self._max_body = max_body
        self._store_requests = StoreRequests(engine, rules, stores, mind, metrics)
        _add_gauges(metrics, engine, stores)

    def app(self) -> Starlette:
        """The application; it starts and stops the engine."""
        store = "/stores/{name}"
        routes = [
            self._route("/health", self._health, "GET"),
            self._route("/metrics", self._metrics, "GET"),
            self._route("/v1/models", self._models, "GET"),
            self._route("/v1/models/{model:path}", self._model, "GET"),
            self._route("/v1/completions", self._complete, "POST"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/search", self._search, "POST"),
            self._route("/stores", self._list_stores, "GET"),
            self._route(store, self._show_store, "GET"),
            self._route(f"{store}/documents", self._add_documents, "POST"),
            self._route(f"{store}/documents/{{id}}", self._document, "GET", "DELETE"),
        ]
        handlers: Any = {HTTPException: self._http_error, Exception: self._unexpected}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    # Around every request

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)

    def _route(self, path: str, handler: Handler, *methods: str) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                response = await handler(request)
            except ApiError as error:
                response = _error(error)
            except ClientDisconnect:  # before all of its body came
                response = _error(ApiError(499, "the client went away"))
            except Exception as error:
                logger.exception("%s %s failed", request.method, request.url.path)
                response = await self._unexpected(request, error)
            self.metrics.count(self.metrics.requests, path=path, status=str(response.status_code))
            return response

        return Route(path, endpoint, methods=list(methods))

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """A path or a method that there is not."""
        what = f"{request.method} {request.url.path}"
        reasons = {404: f"there is no {what}", 405: f"{what} is not a method of this path"}
        return _error(ApiError(error.status_code, reasons.get(error.status_code, error.detail)))

    async def _unexpected(self, request: Request, error: Exception) -> Response:
        """A mistake of ours."""
        return _error(ApiError(500, f"the request failed: {type(error).__name__}"))

    async def _body(self, request: Request) -> Body:
        parts, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._max_body:
                raise ApiError(413, f"a request may have at most {self._max_body} bytes", code="body_too_large")
            parts.append(chunk)
        return Body.parse(b"".join(parts))

    # What is served

    async def _health(self, request: Request) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self.rules.model:
            raise ApiError(404, f"there is no model {request.path_params['model']!r}", code="model_not_found")
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.rules.model, "object": "model", "created": 0, "owned_by": "fairseq-memory"}

    # Generation

    async def _complete(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answer(request, await asyncio.to_thread(read_completion, body, self.rules))

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answer(request, await asyncio.to_thread(read_chat, body, self.rules))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        queue: asyncio.Queue[tuple[int, list[Any]]] = asyncio.Queue()
        jobs = [
            GenerationJob(generation, Mailbox(queue, number, streams=asked.streams))
            for number, generation in enumerate(asked.generations)
        ]
        form = AnswerForm(asked, self.rules.model, self.rules.codec, self._neighbors_of)
        self.engine.submit(*jobs)
        if asked.streams:
            events = self._stream(form, jobs, queue)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        with self._cancelling(jobs):
            await _unless_disconnected(request, self._collect(form, jobs, queue))
        return JSONResponse(form.whole())

    async def _collect(self, form: AnswerForm, jobs: list[GenerationJob], queue: asyncio.Queue[Any]) -> None:
        async for number, events in _events(jobs, queue):
            form.take(number, events)

    async def _stream(
        self, form: AnswerForm, jobs: list[GenerationJob], queue: asyncio.Queue[Any]
    ) -> AsyncIterator[str]:
        """Server-sent events, the last of them [DONE]; an error ends the stream."""
        with self._cancelling(jobs):
            for chunk in form.begin():
                yield _event(chunk)
            try:
                async for number, events in _events(jobs, queue):
                    form.take(number, events)
                    for chunk in form.chunks():
                        yield _event(chunk)
            except ApiError as error:
                yield _event(error.body())
                return
            for chunk in form.usage_chunk():
                yield _event(chunk)
            yield "data: [DONE]\n\n"

    @contextlib.contextmanager
    def _cancelling(self, jobs: list[GenerationJob]) -> Iterator[None]:
        """Give up the jobs that are not complete when the block ends, as it does when the client goes away."""
        try:
            yield
        finally:
            for job in jobs:
                if job.num_open or not job.has_begun:
                    self.engine.cancel(job)

    def _neighbors_of(self, event: TokenEvent) -> list[dict[str, Any]]:
        if event.found is None or event.store is None:
            return []
        return describe_found(self.stores[event.store].store, self.rules.codec, event.found)

    # Stores

    async def _list_stores(self, request: Request) -> Response:
        return JSONResponse({"stores": self._store_requests.all()})

    async def _show_store(self, request: Request) -> Response:
        return JSONResponse(self._store_requests.show(request.path_params["name"]))

    async def _search(self, request: Request) -> Response:
        wanted = await asyncio.to_thread(read_search, await self._body(request), self.rules)
        return JSONResponse(await self._task(self._store_requests.search(wanted)))

    async def _add_documents(self, request: Request) -> Response:
        body = await self._body(request)
        steps = await asyncio.to_thread(self._store_requests.add, request.path_params["name"], body)
        return JSONResponse(await self._task(steps), 201)

    async def _document(self, request: Request) -> Response:
        name, number = request.path_params["name"], _document_number(request.path_params["id"])
        if request.method == "DELETE":
            return JSONResponse(await self._task(self._store_requests.delete(name, number)))
        return JSONResponse(self._store_requests.document(name, number))

    async def _task(self, steps: Callable[[], Iterator[Any]]) -> Any:
        """Result of work for the thread that runs the model; it is done whether or not the client waits."""
        queue: asyncio.Queue[tuple[int, list[Any]]] = asyncio.Queue()
        self.engine.submit(TaskJob(steps, Mailbox(queue)))
        _, (result,) = await queue.get()
        if isinstance(result, Failure):
            raise result.error
        assert isinstance(result, Outcome)
        return result.value


async def _events(jobs: list[GenerationJob], queue: asyncio.Queue[Any]) -> AsyncIterator[tuple[int, list[Any]]]:
    """Events of all jobs, until all their choices are complete. Raises: ApiError when one fails."""
    left = sum(job.request.num_choices for job in jobs)
    while left:
        number, events = await queue.get()
        for event in events:
            if isinstance(event, Failure):
                raise event.error
            left -= isinstance(event, ChoiceEnd)
        yield number, events


async def _unless_disconnected(request: Request, work: Any) -> None:
    """Await some work, or give it up when the client goes away. Raises: ApiError then, which nobody reads."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away")
        working.result()
    finally:
        for task in (working, gone):
            task.cancel()


def _document_number(text: str) -> int:
    """Number of a document in a path. Raises: ApiError for anything else."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ApiError(404, f"a document has a number, got {text[:40]!r}", param="id", code="document_not_found")
    return int(text)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers=headers)


def _add_gauges(metrics: Metrics, engine: Engine, stores: Mapping[str, ServedStore]) -> None:
    metrics.add_gauge("fairseq_waiting", "Requests that wait.", lambda: {(): engine.num_waiting})
    metrics.add_gauge("fairseq_running", "Sequences that are generated.", lambda: {(): engine.num_running})
    metrics.add_gauge(
        "fairseq_store_rows",
        "Rows of each store that are not deleted.",
        lambda: {(("store", name),): float(store.store.num_alive) for name, store in stores.items()},
    )
