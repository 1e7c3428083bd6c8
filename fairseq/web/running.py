"""Start and stop of a program that listens on a network address."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fairseq.web.access import EVERY_ADDRESS, LOOPBACK_NAMES, Access, App, Guard

if TYPE_CHECKING:
    import uvicorn

    from fairseq.web.config import AddressConfig

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""Seconds that requests get to end after the program was asked to stop."""


class Address:
    """A bound address. The program holds it from the start, so that a port in use is found before any model is loaded.

    ```python
    with Address(AddressConfig(port=0)) as address:
        run(app, address)
    ```
    """

    def __init__(self, config: AddressConfig) -> None:
        """Bind. Raises: ValueError when the address is in use or not of this machine."""
        host = config.host or "127.0.0.1"
        self.is_loopback = host in LOOPBACK_NAMES
        self.token = config.chosen_token or (None if self.is_loopback else secrets.token_urlsafe(24))
        self.socket = _bound(host, config.port)
        self.host, self.port = host, int(self.socket.getsockname()[1])

    def __enter__(self) -> Address:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def url(self) -> str:
        """Address for a browser, with the token if there is one."""
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    def access(self, open_paths: frozenset[str] = frozenset()) -> Access:
        """Rule of who may ask."""
        names = None if self.host in EVERY_ADDRESS else LOOPBACK_NAMES | {self.host.lower()}
        return Access(names, self.token, open_paths)


def run(
    app: App,
    address: Address,
    *,
    open_paths: frozenset[str] = frozenset(),
    grace_seconds: int = GRACE_SECONDS,
    ready: Callable[[], None] | None = None,
) -> None:
    """Answer requests until the program is interrupted or terminated; requests in progress are answered first.

    Args:
        open_paths: paths that are answered without the token.
        grace_seconds: how long the requests in progress may take.
        ready: called when the program listens; by default the address is printed.
    Raises: ValueError when uvicorn is not installed.
    """
    server = make_server(app, address, open_paths=open_paths, grace_seconds=grace_seconds)
    (ready or (lambda: print_address(address)))()
    with _signals_end_here():
        server.run(sockets=[address.socket])


def make_server(
    app: App, address: Address, *, open_paths: frozenset[str] = frozenset(), grace_seconds: int = GRACE_SECONDS
) -> uvicorn.Server:
    """The server that ``run`` runs; in a thread other than the main one, setting its ``should_exit`` stops it.

    Raises: ValueError when uvicorn is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ValueError(
            "uvicorn is not installed; pip install 'fairseq-memory[serve]' or, for the explorer, '[explore]'"
        ) from error
    return uvicorn.Server(
        uvicorn.Config(
            Guard(app, address.access(open_paths)),
            log_level="warning",
            access_log=False,  # its lines would hold the token of the address
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=grace_seconds,
        )
    )


def print_address(address: Address) -> None:
    """Print where the program listens."""
    sys.stdout.write(f"listening on {address.url}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _signals_end_here() -> Iterator[None]:
    """uvicorn sends itself the signal that stopped it once more when all is answered; here it ends nothing then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(
            f"--host {host} cannot be resolved ({error.strerror}); give an address of this machine"
        ) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # right after a stop the port is not free otherwise
        bound.bind(place)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} of {host} is in use; give another, or 0 for a free one") from None
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror}; give another --host or --port"
        ) from None
    return bound
