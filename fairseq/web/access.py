"""Who may ask a program that listens on a network address: a wrapper around its application.

A program that listens on the loopback address alone can still be reached by any web page that the user visits, through
his browser: by requests across origins, and by a name that the page's owner lets point to 127.0.0.1 (DNS rebinding). So
the Host header must be one of the program's own names, the Origin header, where a browser sends one, must be the page
that the program served, and on other addresses every request must carry a secret.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True)
class Access:
    """The rule of one program.

    ```python
    app = Guard(app, Access(names=LOOPBACK_NAMES))
    ```
    """

    names: frozenset[str] | None
    """Names that the Host header may have; None for any, where a token is required."""
    token: str | None = None
    """Secret that every request has to carry; None for none."""
    open_paths: frozenset[str] = frozenset()
    """Paths that are answered without the secret, such as one that tells whether the program is alive."""

    def __post_init__(self) -> None:
        assert self.names is not None or self.token is not None, "any name needs a token"

    def refusal(self, path: str, query: bytes, headers: dict[str, str]) -> tuple[int, str] | None:
        """HTTP status and reason for which a request is rejected; None for one that may pass."""
        host = headers.get("host", "")
        if self.names is not None and _hostname(host) not in self.names:
            return (
                421,
                f"this server is not {host or 'without a Host header'}; its names: {', '.join(sorted(self.names))}",
            )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            return 403, f"requests of pages from {origin} are not answered; open the page of this server"
        if self.token is None or path in self.open_paths or self._knows(query, headers):
            return None
        return 401, "the token is missing or wrong; give the header Authorization: Bearer TOKEN"

    def _knows(self, query: bytes, headers: dict[str, str]) -> bool:
        """True if the request carries the secret: as a header, or in the address, as a browser's first request does."""
        assert self.token is not None
        kind, _, given = headers.get("authorization", "").partition(" ")
        found = [given.strip()] if kind.lower() == "bearer" else []
        found += parse_qs(query.decode("latin-1")).get("token", [])
        # In bytes, and all of them, so that the time says nothing about the secret.
        return any([hmac.compare_digest(one.encode(), self.token.encode()) for one in found])


class Guard:
    """An ASGI application that answers what ``Access`` permits and rejects the rest with OpenAI's form of an error."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.access.refusal(scope["path"], scope.get("query_string", b""), headers)
        if refusal is None and scope["type"] == "http":
            await self.app(scope, receive, send)
            return
        status, reason = refusal or (426, "this server speaks HTTP only")
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason[:120]})
            return
        body = json.dumps({"error": {"message": reason, "type": "access_error", "param": None, "code": None}}).encode()
        sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        sent += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": body})


def _netloc(origin: str) -> str | None:
    """Name and port in an Origin header; None for one that has none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:  # a bracket without its other half
        return None


def _hostname(host: str) -> str:
    """Name or address in a Host header, without the port; a name in lower case."""
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        return "" if port and not port.startswith(":") else name.lower()
    return host.partition(":")[0].lower()
