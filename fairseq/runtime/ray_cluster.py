"""The only module that imports Ray, and only when a cluster is used: actors that are asked by number, and commands."""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fairseq.registry import did_you_mean

logger = logging.getLogger(__name__)

_NAMESPACE = "fairseq-memory"
_START_SECONDS = 120.0  # importing torch on a busy disk; a node that has to come back takes longer than any user waits
_CONNECT_SECONDS = 5.0
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


def check_target(flag: str, target: str) -> None:
    """Raise ValueError unless a flag's value is ``ray`` or ``ray://ADDRESS``."""
    if target == "ray" or re.fullmatch(r"ray://(auto|.+:\d+)", target):
        return
    hint = did_you_mean(target, ["ray"])
    raise ValueError(f"{flag} {target} is not ray or ray://HOST:PORT (the address that ray start prints){hint}")


def connect(target: str) -> str:
    """Start Ray on this machine (``ray``), or join the cluster at ``ray://HOST:PORT``; returns its address.

    ``ray://auto`` is the cluster of this node. A process that has joined one stays in it.
    Raises: ValueError where Ray is not installed or of another version; OSError where no cluster answers.
    """
    ray = ray_library()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings: dict[str, Any] = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        if target == "ray":
            # Ray gives workers niceness 15: a search beside other work would hardly run (see docs/scale.md).
            os.environ.setdefault("RAY_worker_niceness", "0")
            settings |= {"include_dashboard": False, "object_store_memory": _store_bytes()}
            ray.init(**settings)
        else:
            _join(target.removeprefix("ray://"), settings)
    return str(ray.get_runtime_context().gcs_address)


def _join(address: str, settings: dict[str, Any]) -> None:
    ray = ray_library()
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, **settings)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise _no_cluster(address, error) from None
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        theirs, ours = (f"Ray {ray_} on Python {python}" for ray_, python in versions[:2])
        raise ValueError(f"the cluster at {address} runs {theirs}, this process {ours}; install the same") from None
    except (OSError, ValueError, OverflowError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: BaseException) -> OSError:
    reason = str(error).strip().partition("\n")[0]
    return OSError(
        f"no Ray cluster at {address} ({reason}); run on one of its nodes, with the address that ray start --head "
        "prints (its port is 6379 by default)"
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


def place(paths: Sequence[Sequence[str]], nodes: Sequence[Node], seen: Sequence[Sequence[bool]]) -> list[Node]:
    """A node for each worker that has its files, the least loaded by workers per CPU.

    Args:
        paths: of each worker, the files it reads.
        seen: of each node and worker, whether all of these are there.
    Raises: ValueError for a worker whose files no node has.
    """
    load, placed = [0] * len(nodes), []
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


class RayActors:
    """Objects that live on the nodes of a cluster, one a worker, and are called by number.

    Ray starts one that dies again, on another node if need be; what it was asked is lost, which ``receive`` raises.
    """

    def __init__(self, actors: list[Any], create: Callable[[int], Any] | None, ready: str) -> None:
        """Args.

        create: starts a worker anew; None for those of another process.
        ready: the method that answers when a worker can work.
        """
        self._actors, self._create, self._ready = actors, create, ready

    @classmethod
    def start(
        cls,
        kind: type,
        arguments: Sequence[Any],
        paths: Sequence[Sequence[str]],
        ready: str,
        service: str | None = None,
    ) -> RayActors:
        """Start a worker for each argument: ``kind(argument, threads)``.

        Args:
            paths: of each worker, the files it reads.
            service: name under which other processes find them, also when this one has ended; None for this one alone.
        Raises: ValueError when no node has a worker's files.
        """
        ray = ray_library()
        machines = nodes()
        placed = place(paths, machines, _seen(machines, paths))
        shares = [node.cpus / placed.count(node) for node in placed]
        remote = ray.remote(kind)

        def create(worker: int) -> Any:
            share = shares[worker]
            options: dict[str, Any] = {"max_restarts": -1, "num_cpus": int(share) if share >= 1 else round(share, 4)}
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            options["scheduling_strategy"] = strategy(placed[worker].id, soft=True)
            if service is not None:
                options |= {"name": f"{service}:{worker}-of-{len(arguments)}", "lifetime": "detached"}
            return remote.options(**options).remote(arguments[worker], max(1, int(share)))

        return cls([create(worker) for worker in range(len(arguments))], create, ready)

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
            return getattr(self._actors[worker], method).remote(*arguments)

    def receive(self, call: Any, seconds: float | None = None) -> Any:
        """The result of a call.

        Raises: WorkerLostError when the worker died before it answered; ValueError or OSError that the method raised.
        """
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
        errors = ray_library().exceptions
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.receive(self.send(worker, self._ready), max(1.0, deadline - time.monotonic()))
            except WorkerLostError as error:
                if time.monotonic() > deadline:
                    raise WorkerLostError(f"it did not start in {_START_SECONDS:.0f} s: {_free()}") from error
            else:
                return
            time.sleep(0.2)
            try:
                ray_library().get(self._actors[worker].__ray_ready__.remote(), timeout=_START_SECONDS)
            except errors.ActorDiedError as error:  # killed for good, which Ray does not repair
                if self._create is None:
                    raise WorkerLostError("its service has ended") from error
                self._actors[worker] = self._create(worker)
            except errors.RayError:
                continue

    def end(self) -> None:
        """Stop all workers for good."""
        for actor in self._actors:
            ray_library().kill(actor)


def _seen(machines: Sequence[Node], paths: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Of each node and worker, whether the worker's files are there."""
    ray = ray_library()
    if len(machines) == 1:  # its worker names the file that is missing
        return [[True] * len(paths)]
    look = ray.remote(_all_exist)
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
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
    """A command that ended on some node."""

    number: int
    code: int
    node: str
    out: str
    error: str
    """The last line of its standard error."""


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
