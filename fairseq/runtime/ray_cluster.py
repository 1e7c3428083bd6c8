"""The only module that imports Ray, and only when a cluster is used: actors that are asked by number, and commands."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fairseq.runtime.forking import FORKS, ForkedObject, LocalObject, packed, start_origin

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NAMESPACE = "fairseq-memory"
_START_SECONDS = 120.0  # importing torch on a busy disk; a node that has to come back takes longer than any user waits
_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 30.0  # Ray waits without end for a server that is none of its own
_TRIES = "RAY_gcs_server_port_wait_time_s"
_LOOK_SECONDS = 5.0  # between looks at whether a worker's node is lost
_SHARED_MEMORY = "/dev/shm"
_MOST_STORE_BYTES = 1 << 30
_LEAST_STORE_BYTES = 80 << 20  # Ray rejects less than 75 MiB
_USER_ERROR = 2


class WorkerLostError(RuntimeError):
    """A worker died, or its node did; what it was asked can be asked again."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that can run workers."""

    id: str
    name: str
    cpus: float


@functools.cache
def ray_library() -> Any:
    """The ray module. Raises: ValueError where it is not installed."""
    # Else a lost worker is a page of text on standard output, among results; callers log it on one line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("Ray is not installed; pip install 'fairseq-memory[ray]'") from error
    return ray


def connect(target: str, kind: type | None = None) -> str:
    """Start Ray on this machine (``ray``), or join the cluster at ``ray://HOST:PORT``; returns its address.

    ``ray://auto`` is the cluster of this node; ``kind`` is what actors will be made of, whose module is imported
    meanwhile. A process that has joined a cluster stays in it.
    Raises: ValueError where Ray is not installed or of another version; OSError where no cluster answers.
    """
    begun = _begun.pop(target, None)  # taken once: Ray may be shut down and started again
    return begun.result() if begun is not None else _connect(target, kind.__module__ if kind else None)


_begun: dict[str, Future[str]] = {}


def begin_connecting(target: str, module: str) -> None:
    """Begin what ``connect`` then waits for, and raises, meanwhile; ``module`` is that of the actors' kind."""
    if target not in _begun:
        _begun[target] = _in_background(lambda: _connect(target, module))


def _in_background(work: Callable[[], T]) -> Future[T]:
    """The coming result of some work in a thread that lasts as long as this process."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        threading.Event().wait()  # with the thread that started them the kernel would end Ray's processes

    threading.Thread(target=run, name="connecting to Ray", daemon=True).start()
    return done


def _connect(target: str, module: str | None) -> str:
    if target == "ray" and module and FORKS:
        start_origin(_origin(), module)
    ray = ray_library()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings: dict[str, Any] = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        if target == "ray":
            # Ray gives workers niceness 15: a search beside other work would hardly run (see docs/scale.md).
            os.environ.setdefault("RAY_worker_niceness", "0")
            settings |= {"include_dashboard": False, "object_store_memory": _store_bytes()}
            with _fewer_services(ray):
                ray.init(address="local", **settings)  # whatever RAY_ADDRESS says
        else:
            _join(target.removeprefix("ray://"), settings)
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _fewer_services(ray: Any) -> Iterator[None]:
    """Start a Ray for this process alone without what it does not use: dashboard, autoscaler, and monitor of logs.

    They take 3 of 10 s of CPU, and workers start when the dashboard answers. Ray 2.60 has no setting for this; one that
    lacks the names below starts them all.
    """
    try:
        parameter, node = ray._private.parameter, ray._private.node.Node
        params, start = parameter.RayParams, node.start_api_server
    except AttributeError:
        yield
        return
    parameter.RayParams = functools.partial(params, no_monitor=True, include_log_monitor=False)
    node.start_api_server = lambda self, **options: None
    try:
        yield
    finally:
        parameter.RayParams, node.start_api_server = params, start


@functools.cache
def _origin() -> str:
    """Name of the process that is forked for this one's actors, on each node."""
    return f"fairseq-{secrets.token_hex(16)}"


def _join(address: str, settings: dict[str, Any]) -> None:
    ray = ray_library()
    init = functools.partial(ray.init, address=address, **settings)
    try:
        if address != "auto" and os.environ.get("RAY_USE_TLS", "0") in ("0", "false"):
            _require_server(address)
        tries = os.environ.setdefault(_TRIES, "2")  # of a second each, by default 20
        try:
            _in_background(init).result(_JOIN_SECONDS)
        except (RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
            if "Version mismatch" in str(error) or not _use_token():
                raise
            _in_background(init).result(_JOIN_SECONDS)
        finally:
            if tries == "2":  # a Ray that starts needs more
                del os.environ[_TRIES]
    except FutureTimeout:
        raise _no_cluster(address, TimeoutError("no answer")) from None
    except (RuntimeError, OSError, ValueError, OverflowError, ray.exceptions.RayError) as error:
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        if len(versions) < 2:
            raise _no_cluster(address, error) from None
        theirs, ours = (f"Ray {ray_} on Python {python}" for ray_, python in versions[:2])
        raise ValueError(f"the cluster at {address} runs {theirs}, this process {ours}; install the same") from None


def _require_server(address: str) -> None:
    """Raise OSError unless a server of the protocol of Ray's (HTTP/2) answers there."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), _CONNECT_SECONDS) as server:
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        answer = server.recv(9)
    if answer[3:4] != b"\4":  # its settings come first (RFC 9113, sec. 3.4)
        raise OSError("another kind of server answers")


def _use_token() -> bool:
    """Send the user's token, as Ray 2.60 does to a cluster without address alone; False if there is none.

    Only to a cluster that rejected us: one without tokens would take this process for dead, which rejects its calls.
    """
    with suppress(ImportError, AttributeError):  # another version
        from ray._private.authentication import authentication_token_setup as tokens

        return bool(tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False))
    return False


def _no_cluster(address: str, error: BaseException) -> OSError:
    reason = str(error).strip().partition("\n")[0]
    return OSError(
        f"no Ray cluster at {address} ({reason}); run on one of its nodes, with the address that ray start --head "
        "prints (its port is 6379 by default), and with the token of its nodes (~/.ray/auth_token)"
    )


def _store_bytes() -> int:
    """Size of the object store: what a few batches need, within the shared memory that is free."""
    try:
        stats = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return _LEAST_STORE_BYTES
    return max(_LEAST_STORE_BYTES, min(_MOST_STORE_BYTES, stats.f_bavail * stats.f_frsize // 2))


def nodes() -> list[Node]:
    """The nodes that run workers. Raises: OSError when there is none."""
    found = [
        Node(each["NodeID"], each["NodeManagerHostname"], each["Resources"]["CPU"])
        for each in ray_library().nodes()
        if each["Alive"] and each["Resources"].get("CPU")
    ]
    if not found:
        raise OSError("no node of the Ray cluster has CPUs; start one with ray start --address")
    return found


def place(
    paths: Sequence[Sequence[str]],
    nodes: Sequence[Node],
    seen: Sequence[Sequence[bool]],
    present: Sequence[Node] = (),
) -> list[Node]:
    """A node for each worker that has its files (``paths``), the least loaded by workers per CPU.

    Args:
        seen: of each node and worker, whether all of these are there.
        present: nodes of other workers, one a worker.
    Raises: ValueError for a worker whose files no node has.
    """
    load: list[int] = [present.count(node) for node in nodes]
    placed: list[Node] = []
    for worker, files in enumerate(paths):
        choice = [number for number in range(len(nodes)) if seen[number][worker]]
        if not choice:
            raise ValueError(
                f"no node of the Ray cluster has {', '.join(files)}; put the datastore on a disk that every node sees, "
                "or copy each shard to the node that is to search it, under the same name"
            )
        best = min(choice, key=lambda number: (load[number] + 1) / nodes[number].cpus)
        load[best] += 1
        placed.append(nodes[best])
    return placed


class Creation:
    """What workers are made of and where they are, to create one again, on another node if its own is lost."""

    def __init__(
        self, kind: type, arguments: Sequence[Any], paths: Sequence[Sequence[str]], service: str | None
    ) -> None:
        """Take what ``RayActors.start`` takes. Raises: ValueError when no node has a worker's files."""
        self._kind, self._arguments, self._paths, self._service = kind, arguments, paths, service
        machines = nodes()
        self._placed = place(paths, machines, _seen(machines, paths))
        # Of CPUs; what is moved later takes what it finds: its new node has given all CPUs to its own workers.
        self._shares = [node.cpus / self._placed.count(node) for node in self._placed]

    def create(self, worker: int) -> Any:
        """Start a worker."""
        ray, node, share = ray_library(), self._placed[worker], self._shares[worker]
        # Rounded down, to the digits that Ray keeps: three times 0.6667 are more than two CPUs.
        options: dict[str, Any] = {"max_restarts": -1, "num_cpus": int(share) if share >= 1 else int(share * 1e4) / 1e4}
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        options["scheduling_strategy"] = strategy(node.id, soft=True)
        if self._service is not None:
            options["name"] = f"{self._service}:{worker}-of-{len(self._arguments)}"
        words = (self._kind, self._arguments[worker], max(1, int(node.cpus / self._placed.count(node))))
        given = (_origin(), self._kind.__module__, packed(*words)) if FORKS else words
        return ray.remote(ForkedObject if FORKS else LocalObject).options(**options).remote(*given)

    def node_is_lost(self, worker: int) -> bool:
        """True if the node that a worker was placed on is not part of the cluster any more."""
        return self._placed[worker].id not in [node.id for node in nodes()]

    def move(self, worker: int) -> None:
        """Choose another node for a worker. Raises: ValueError when no node has its files."""
        machines, paths = nodes(), [self._paths[worker]]
        others = self._placed[:worker] + self._placed[worker + 1 :]
        (self._placed[worker],) = place(paths, machines, _seen(machines, paths), others)
        self._shares[worker] = 0


class RayActors:
    """Objects that live on the nodes of a cluster, one a worker, and are called by number.

    Ray starts one that dies again; one whose node is lost is created on another node that has its files. What it was
    asked is lost, which ``receive`` raises.
    """

    def __init__(self, actors: list[Any], creation: Creation | None, ready: str) -> None:
        """Take what creates a worker again, None for those of another process, and the method that answers first."""
        self._actors, self._creation, self._ready = actors, creation, ready

    @classmethod
    def start(
        cls,
        kind: type,
        arguments: Sequence[Any],
        paths: Sequence[Sequence[str]],
        ready: str,
        service: str | None = None,
    ) -> RayActors:
        """Start a worker for each argument: ``kind(argument, threads)``, which reads the files of ``paths``.

        Args:
            service: name under which other processes find them, while this one lives; None for this one alone.
        Raises: ValueError when no node has a worker's files; OSError when the cluster has no CPUs for them.
        """
        creation = Creation(kind, arguments, paths, service)
        actors = cls([creation.create(worker) for worker in range(len(arguments))], creation, ready)
        try:
            actors._wait_for_cpus()
        except BaseException:
            actors.end()
            raise
        return actors

    @classmethod
    def find(cls, service: str, ready: str) -> RayActors | None:
        """The workers that another process serves under a name; None if it is not served, or not whole."""
        ray = ray_library()
        named = [name for name in ray.util.list_named_actors() if name.startswith(f"{service}:")]
        count = int(named[0].rpartition("-")[2]) if named else 0
        names = [f"{service}:{worker}-of-{count}" for worker in range(count)]
        if not count or not set(names) <= set(named):
            return None
        return cls([ray.get_actor(name) for name in names], None, ready)

    @staticmethod
    def services() -> list[str]:
        """Names under which workers are served."""
        names = ray_library().util.list_named_actors()
        return sorted({name.rpartition(":")[0] for name in names})

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def shared_bytes(self) -> int:
        """Size of the smallest object store."""
        held = [each["Resources"].get("object_store_memory", 0) for each in ray_library().nodes() if each["Alive"]]
        return int(min(filter(None, held), default=_LEAST_STORE_BYTES))

    def share(self, value: Any) -> Any:
        """A handle of an argument that several calls take."""
        with _store_errors():
            return ray_library().put(value)

    def send(self, worker: int, method: str, *arguments: Any) -> Any:
        """Begin a call."""
        with _store_errors():
            return self._actors[worker].call.remote(method, *arguments)

    def receive(self, call: Any, seconds: float | None = None) -> Any:
        """The result of a call. Raises: WorkerLostError when the worker died; ValueError or OSError of the method."""
        errors = ray_library().exceptions
        try:
            with _store_errors():
                return ray_library().get(call, timeout=seconds)
        except errors.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from None
            raise
        except errors.GetTimeoutError:
            raise WorkerLostError(f"no answer in {seconds:.0f} s: {_free()}") from None
        except (errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError) as error:
            raise WorkerLostError(" ".join(str(error).split())[:200]) from None

    def restart(self, worker: int) -> None:
        """Wait until a lost worker answers. Raises: WorkerLostError when it does not come back."""
        ray = ray_library()
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._creation is not None and self._creation.node_is_lost(worker):
                self._replace(worker, moved=True)
            try:
                ray.get(self._actors[worker].__ray_ready__.remote(), timeout=_LOOK_SECONDS)
                self.receive(self.send(worker, self._ready), max(1.0, deadline - time.monotonic()))
            except ray.exceptions.ActorDiedError as error:  # killed for good, which Ray does not repair
                if self._creation is None:
                    raise WorkerLostError("its service has ended") from error
                self._replace(worker, moved=False)
            except (ray.exceptions.RayError, WorkerLostError) as error:
                logger.debug("worker %d is not back: %s", worker, error)
            else:
                return
            time.sleep(0.2)
        raise WorkerLostError(f"it did not start in {_START_SECONDS:.0f} s: {_free()}")

    def _replace(self, worker: int, *, moved: bool) -> None:
        """Create a worker again. Raises: WorkerLostError when no node has its files any more."""
        assert self._creation is not None
        ray_library().kill(self._actors[worker])
        if moved:
            try:
                self._creation.move(worker)
            except (ValueError, OSError) as error:
                raise WorkerLostError(f"its node is lost, and {error}") from error
        self._actors[worker] = self._creation.create(worker)

    def _wait_for_cpus(self) -> None:
        """Wait until all workers run. Raises: OSError when they do not, because others hold the CPUs."""
        calls = [actor.__ray_ready__.remote() for actor in self._actors]
        for seconds in (_LOOK_SECONDS, _START_SECONDS):
            _, waiting = ray_library().wait(calls, num_returns=len(calls), timeout=seconds)
            if not waiting:
                return
            logger.warning("%s; waiting", state := f"{len(waiting)} of {len(calls)} actors have not started: {_free()}")
        raise OSError(
            f"{state}; end what else uses the cluster, or search a datastore that several commands share by "
            "fairseq-datastore serve"
        )

    def end(self) -> None:
        """Stop all workers for good."""
        for actor in self._actors:
            ray_library().kill(actor)


def _seen(machines: Sequence[Node], paths: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Of each node and worker, whether the worker's files are there."""
    if len(machines) == 1:  # its worker names the file that is missing
        return [[True] * len(paths)]
    ray = ray_library()
    look, strategy = ray.remote(_all_exist), ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    calls = [
        look.options(num_cpus=0, scheduling_strategy=strategy(node.id, soft=False)).remote(paths) for node in machines
    ]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=_START_SECONDS)
    return [ray.get(call) if call in done else [False] * len(paths) for call in calls]


def _all_exist(paths: Sequence[Sequence[str]]) -> list[bool]:
    return [all(os.path.isfile(path) for path in files) for files in paths]


def _free() -> str:
    """The free CPUs in words: a worker that waits for some does not answer."""
    return f"{ray_library().available_resources().get('CPU', 0):g} CPUs of the Ray cluster are free"


@contextmanager
def _store_errors() -> Iterator[None]:
    """Raise OSError where Ray's object store has no room."""
    errors = ray_library().exceptions
    try:
        yield
    except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
        raise OSError(
            f"Ray's object store is full ({str(error).strip().partition(chr(10))[0]}); start Ray with a larger "
            "--object-store-memory, or end what else uses the cluster"
        ) from None


@dataclass(frozen=True)
class FinishedCommand:
    """A command that ended on some node; ``error`` is the last line of its standard error."""

    number: int
    code: int
    node: str
    out: str
    error: str


def run_commands(
    commands: Sequence[Sequence[str]], *, cpus: float, gpus: float, attempts: int
) -> Iterator[FinishedCommand]:
    """Run commands as tasks, as many at a time as the cluster has CPUs and GPUs for; yields them as they end.

    One that a signal or a lost node ends runs again, up to ``attempts`` times in all; a user error (status 2) does not.
    """
    ray = ray_library()
    task = ray.remote(_run).options(
        num_cpus=cpus, num_gpus=gpus, max_retries=attempts - 1, scheduling_strategy="SPREAD"
    )
    folder, threads = os.getcwd(), str(max(1, int(cpus)))
    under_way = {task.remote(number, list(words), folder, threads): 1 for number, words in enumerate(commands)}
    while under_way:
        (call,), _ = ray.wait(list(under_way), num_returns=1)
        attempt = under_way.pop(call)
        done: FinishedCommand = ray.get(call)
        if done.code in (0, _USER_ERROR) or attempt == attempts:
            yield done
            continue
        logger.warning("command %d ended with status %d on %s; again", done.number, done.code, done.node)
        under_way[task.remote(done.number, list(commands[done.number]), folder, threads)] = attempt + 1


def _run(number: int, words: list[str], folder: str, threads: str) -> FinishedCommand:
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    error = (done.stderr.strip().splitlines() or [""])[-1]
    return FinishedCommand(number, done.returncode, socket.gethostname(), done.stdout, error)
