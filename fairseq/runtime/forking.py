"""Objects in processes of their own, forked from one that has imported their module.

Importing torch takes 2 s of a CPU, for each process; forking one that has imported it takes 20 ms.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, NoReturn

FORKS = sys.platform == "linux"  # sockets without a file, whose owner the kernel states
_START_SECONDS = 120.0  # importing torch from a busy disk
RESTART_SECONDS = 5.0  # an actor that Ray starts again comes within a second
_BACKLOG = 1024


class LocalObject:
    """An object in this process, called as a ``ForkedObject`` is."""

    def __init__(self, kind: type, *arguments: Any) -> None:
        """Create ``kind(*arguments)``."""
        self._object = kind(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object."""
        return getattr(self._object, method)(*arguments)


class ForkedObject:
    """An object in a process that is forked for it, and ends with this one.

    ```python
    shelf = ForkedObject("fairseq-example", "fractions", packed(Fraction, 1, 3))
    shelf.call("limit_denominator", 2)  # Fraction(1, 2)
    ```
    """

    def __init__(self, name: str, module: str, creation: bytes) -> None:
        """Args.

        name: of the process that is forked, started where there is none; all processes of this user may share it.
        module: what that process imports.
        creation: see :func:`packed`.
        Raises: OSError when no process starts; what creating the object raises.
        """
        self._connection = _connect(name, module)
        self._connection.send(dict(os.environ))
        self._connection.send_bytes(creation)
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method, whose arguments and results travel as copies. Raises: what it raises.

        When the other process is lost this one ends too: whoever started it starts both.
        """
        try:
            self._connection.send((method, arguments))
            return self._receive()
        except (EOFError, ConnectionError):
            os._exit(1)

    def _receive(self) -> Any:
        result, error = self._connection.recv()
        if error is not None:
            raise error
        return result


def packed(kind: type, *arguments: Any) -> bytes:
    """What creates ``kind(*arguments)`` elsewhere; a process that hands it on need not import what it is made of."""
    return pickle.dumps((kind, arguments))


def start_origin(name: str, module: str, linger: float = 0.0) -> bool:
    """Start the process that is forked under a name, in the background; False if there is one.

    Args:
        module: what it imports.
        linger: seconds that it stays when this process and all that were forked have ended.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(_address(name))
        except OSError:
            return False
        listener.listen(_BACKLOG)
        words = [sys.executable, "-m", __name__, str(listener.fileno()), module, str(linger)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        _held.append(
            subprocess.Popen(
                words,
                stdin=subprocess.PIPE,  # at its end the process knows that this one has ended
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=(listener.fileno(),),
                start_new_session=True,  # Ctrl-C is for whoever uses it
            )
        )
    return True


_held: list[subprocess.Popen[bytes]] = []


def _connect(name: str, module: str) -> Connection:
    """A connection to a new process. Raises: OSError when none starts, or the name belongs to another user."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.ExitStack() as opened:
            client = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                client.connect(_address(name))
            except ConnectionRefusedError:
                start_origin(name, module, RESTART_SECONDS)
                time.sleep(0.01)
                continue
            if _owner(client) != os.getuid():
                raise PermissionError(f"the process {name} belongs to user {_owner(client)}, not to {os.getuid()}")
            connection = Connection(client.detach())
        try:
            connection.recv()
        except (EOFError, ConnectionError):  # it ended before it forked
            connection.close()
        else:
            return connection
    raise OSError(f"no process that imports {module} started in {_START_SECONDS:.0f} s; see the log of this one")


def _address(name: str) -> str:
    return f"\0{name}"  # no file: it is free again when the process ends, however that happens


def _owner(peer: socket.socket) -> int:
    """User of the process at the other end."""
    size = struct.calcsize("3i")
    uid: int = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]
    return uid


def run_origin(listener: socket.socket, module: str, linger: float) -> None:
    """Import a module and fork for every connection, while whoever started this or a forked process lives.

    A function ``before_fork`` of the module is called first, to do once what all forked processes would do.
    """
    with contextlib.suppress(Exception):  # it is raised again where the object is created
        getattr(importlib.import_module(module), "before_fork", int)()
    gc.collect()
    gc.freeze()  # a collection would write to the pages that all share
    started_by, children, lonely = sys.stdin.fileno(), 0, 0.0
    waits: list[Any] = [listener, started_by]
    while lonely <= linger:
        ready, _, _ = select.select(waits, [], [], 1.0)
        if listener in ready:
            children += _fork(listener)
        if started_by in ready:
            waits = [listener]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                children -= 1
        lonely = 0.0 if children or started_by in waits else lonely + (0.0 if ready else 1.0)


def _fork(listener: socket.socket) -> int:
    """Fork for a connection; the number of new processes."""
    client, _ = listener.accept()
    with client:
        if _owner(client) != os.getuid():
            return 0
        if os.fork():
            return 1
        try:
            listener.close()
            os.close(sys.stdin.fileno())
            _serve(Connection(client.detach()))
        finally:
            os._exit(1)


def _serve(connection: Connection) -> NoReturn:
    """Create an object and answer calls until the other end is gone."""
    import threading

    threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
    connection.send("ready")
    environment = connection.recv()
    os.environ.clear()
    os.environ.update(environment)
    made: Any = None

    def create() -> None:
        nonlocal made
        kind, arguments = connection.recv()
        made = kind(*arguments)

    _answer(connection, create)
    while True:
        method, arguments = connection.recv()
        _answer(connection, lambda: getattr(made, method)(*arguments))  # noqa: B023


def _answer(connection: Connection, work: Any) -> None:
    reply: tuple[Any, Exception | None]
    try:
        reply = (work(), None)
    except (ValueError, OSError) as error:
        reply = (None, error)
    except Exception as error:  # of a kind that the other end may not know
        reply = (None, RuntimeError(f"{type(error).__name__}: {error}"))
    connection.send(reply)


def _end_with(descriptor: int) -> None:
    """End this process, at work or not, when the other end is closed."""
    poller = select.poll()
    poller.register(descriptor, select.POLLRDHUP)
    poller.poll()
    os._exit(0)


if __name__ == "__main__":
    run_origin(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], float(sys.argv[3]))
