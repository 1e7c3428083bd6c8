"""The page and the queries behind it, as an ASGI application."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fairseq.explorer.explanation import MOST_AT_ONCE, Explanation
from fairseq.explorer.export import as_html, export, read_page, security_policy
from fairseq.explorer.rules import Setting

logger = logging.getLogger(__name__)

LARGEST_BODY = 1 << 16
"""Bytes of a typed text."""
_SHARED_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


_POLICY = "; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Of the page where it is served, besides what its export has: it asks this server, and nothing may frame it."""


def make_app(explanation: Explanation) -> Starlette:
    """The application of one explanation.

    ```python
    with Address(AddressConfig(port=0)) as address:
        run(make_app(open_saved(["valid.retrieval"])), address)
    ```
    """
    queries = _Queries(explanation)
    routes = [
        Route("/", queries.index),
        Route("/api/about", queries.about),
        Route("/api/tokens", queries.tokens),
        Route("/api/candidates", queries.candidates),
        Route("/api/details", queries.details),
        Route("/api/combined", queries.combined),
        Route("/api/read", queries.read, methods=["POST"]),
        Route("/api/export.json", queries.export_json),
        Route("/api/export.html", queries.export_html),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={ValueError: _rejected, HTTPException: _not_found, Exception: _failed},
        lifespan=_lifespan,
    )


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield


class _Queries:
    """Answers; those that compute run in threads, so that the page stays alive meanwhile."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation

    def index(self, request: Request) -> Response:
        """The page."""
        headers = _SHARED_HEADERS | {"Content-Security-Policy": security_policy() + _POLICY}
        return HTMLResponse(read_page(), headers=headers)

    def about(self, request: Request) -> Response:
        """Everything but the tokens."""
        _Parameters(request, ())
        return _json(self.explanation.about())

    def tokens(self, request: Request) -> Response:
        """Columns of a range of tokens."""
        given = _Parameters(request, ("first", "stop", "text"))
        with_text = given.whole("text", 1) != 0
        return _json(self.explanation.tokens(self._range(given, limited=with_text), text=with_text))

    def candidates(self, request: Request) -> Response:
        """Candidates of a range of tokens."""
        return _json(self.explanation.candidates(self._range(_Parameters(request, ("first", "stop")), limited=True)))

    def details(self, request: Request) -> Response:
        """One token."""
        return _json(self.explanation.details(_Parameters(request, ("at",)).whole("at")))

    def combined(self, request: Request) -> Response:
        """The whole text at a setting; what is not stated is as in the evaluation."""
        given = _Parameters(request, ("k", "lmbda", "temperature", "joint_temperature"))
        opening = self.explanation.opening
        setting = Setting(
            given.whole("k", opening.k),
            given.number("lmbda", opening.weight),
            given.number("temperature", opening.temperature),
            given.number("joint_temperature", opening.joint_temperature),
        )
        return _json(self.explanation.combined(setting))

    async def read(self, request: Request) -> Response:
        """A text that somebody types."""
        content = await _body(request)
        return _json(await run_in_threadpool(self._read, content))

    def _read(self, content: dict[str, Any]) -> dict[str, Any]:
        reader = self.explanation.reader
        if reader is None:
            raise ValueError("no model is open: text can be typed where a model is explored live, not a saved file")
        unknown = content.keys() - {"text", "tokens", "only_next"}
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}; known: text, tokens, only_next")
        if ("text" in content) == ("tokens" in content):
            raise ValueError("give either text or tokens")
        only_next = content.get("only_next", False)
        if not isinstance(only_next, bool):
            raise ValueError(f"only_next is {only_next!r}, not true or false")
        tokens = content.get("tokens")
        if tokens is None:
            if not isinstance(content["text"], str):
                raise ValueError("text is not a string")
            tokens = reader.encode(content["text"])
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("tokens is not a list of whole numbers")
        if len(tokens) > reader.longest:
            raise ValueError(
                f"{len(tokens)} tokens are more than the {reader.longest} that are read at once; shorten it"
            )
        return reader.read(tokens, only_next=only_next)

    def export_json(self, request: Request) -> Response:
        """A range of tokens as JSON."""
        body = export(self.explanation, self._range(_Parameters(request, ("first", "stop"))))
        return Response(body, media_type="application/json", headers=_SHARED_HEADERS | _saved_as("json"))

    def export_html(self, request: Request) -> Response:
        """The page with a range of tokens within."""
        body = as_html(read_page(), export(self.explanation, self._range(_Parameters(request, ("first", "stop")))))
        # Saved, never shown from here: the file has a policy of its own.
        return Response(body, media_type="text/html", headers=_SHARED_HEADERS | _saved_as("html"))

    def _range(self, given: _Parameters, *, limited: bool = False) -> slice:
        rows = self.explanation.rows(given.whole("first", 0), given.whole("stop", len(self.explanation.table)))
        if limited and rows.stop - rows.start > MOST_AT_ONCE:
            raise ValueError(f"{rows.stop - rows.start} tokens are more than the {MOST_AT_ONCE} of one request")
        return rows


class _Parameters:
    """What follows the question mark."""

    def __init__(self, request: Request, known: tuple[str, ...]) -> None:
        """Raises: ValueError for a parameter that is not known."""
        self._given = request.query_params
        for name in self._given:
            if name not in (*known, "token"):
                raise ValueError(f"unknown parameter {name!r}; known: {', '.join(known) or 'none'}")

    def whole(self, name: str, default: Any = "needed") -> Any:
        """A whole number. Raises: ValueError for anything else, or where it is missing and needed."""
        text = self._given.get(name)
        if text is None and default != "needed":
            return default
        if text is None or not re.fullmatch(r"-?\d{1,15}", text):
            raise ValueError(f"{name} is {text!r}, not a whole number")
        return int(text)

    def number(self, name: str, default: float | None) -> float | None:
        """A number. Raises: ValueError for anything else."""
        text = self._given.get(name)
        if text is None:
            return default
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, not a number") from None


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises: ValueError for anything else; HTTPException for one that is too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    read = b""
    async for part in request.stream():
        read += part
        if len(read) > LARGEST_BODY:
            raise HTTPException(413, f"the request is longer than {LARGEST_BODY} bytes")
    try:
        content = json.loads(read)
    except (ValueError, RecursionError):  # also bytes that are no text, and brackets without end
        raise ValueError("the request is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("the request is no JSON object")
    return content


def _json(content: Any) -> Response:
    return JSONResponse(content, headers=_SHARED_HEADERS)


def _saved_as(ending: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="explanation.{ending}"'}


def _error(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers=_SHARED_HEADERS)


async def _rejected(request: Request, error: Exception) -> Response:
    return _error(400, " ".join(str(error).split()))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("%s failed", request.url.path, exc_info=error)
    return _error(500, "the server failed; its log says why")
