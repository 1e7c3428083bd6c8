"""Errors of a cluster in one line, and workers that are started again; Ray itself is a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from fairseq.runtime import ray_cluster
from fairseq.runtime.ray_cluster import RayActors

ERRORS = (
    "RayError RayTaskError GetTimeoutError RayActorError ActorDiedError ObjectLostError OutOfMemoryError "
    "ObjectStoreFullError OutOfDiskError"
).split()
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.9.0
    Python: 3.10.1
This process on node 1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module like ray, with its exceptions."""
    base = type("RayError", (Exception,), {})
    exceptions = {name: type(name, (base,), {}) for name in ERRORS[1:]}
    made = SimpleNamespace(exceptions=SimpleNamespace(RayError=base, **exceptions))
    monkeypatch.setattr(ray_cluster, "ray_library", lambda: made)
    monkeypatch.setattr(ray_cluster, "_use_token", lambda: False)  # Ray keeps the first token that a process reads
    return made


def raising(error: BaseException):
    def call(*words, **more):
        raise error

    return call


def test_ray_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ray_cluster.ray_library.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'fairseq-memory\[ray\]'"):
        ray_cluster.ray_library()


def test_another_version_of_ray_is_named(library):
    library.init = raising(RuntimeError(MISMATCH))
    message = "runs Ray 2.9.0 on Python 3.10.1, this process Ray 2.60.0 on Python 3.11.7; install the same"
    with pytest.raises(ValueError, match=message):
        ray_cluster._join("auto", {})
    library.init = raising(RuntimeError("something else\nand more"))
    with pytest.raises(OSError, match="no Ray cluster at auto .something else.; run on one of its nodes"):
        ray_cluster._join("auto", {})


@pytest.mark.parametrize("kind", ["ObjectStoreFullError", "OutOfDiskError"])
def test_a_full_object_store_is_one_line(library, kind):
    error = getattr(library.exceptions, kind)("no room\nfor 5 bytes")
    library.put = library.get = raising(error)
    actors = RayActors([None], None, "describe")
    for call in (actors.share, actors.receive):
        with pytest.raises(OSError, match="object store is full .no room.; start Ray with a larger"):
            call(object())


class Actor:
    """One that is dead for good, or alive; a call is the function that gets its result."""

    def __init__(self, error: Exception | None = None) -> None:
        call = SimpleNamespace(remote=lambda *words: raising(error) if error else lambda: "facts")
        self.call = self.__ray_ready__ = call


class Creations:
    """Creates workers, some of which are on nodes that are lost."""

    def __init__(self, lost: Sequence[int], error: Exception | None = None) -> None:
        self.lost, self.error = set(lost), error
        self.created: list[int] = []
        self.moved: list[int] = []

    def create(self, worker: int) -> Actor:
        self.created.append(worker)
        return Actor()

    def node_is_lost(self, worker: int) -> bool:
        return worker in self.lost

    def move(self, worker: int) -> None:
        if self.error is not None:
            raise self.error
        self.moved.append(worker)
        self.lost.remove(worker)


def test_a_worker_whose_node_is_lost_moves_where_its_files_are(library):
    library.get = lambda call, timeout=None: call()
    library.kill = lambda actor: None
    library.exceptions.ActorDiedError = type("ActorDiedError", (library.exceptions.RayActorError,), {})
    creation = Creations(lost=[1])
    actors = RayActors([Actor(), Actor()], creation, "describe")
    actors.restart(1)
    assert (creation.created, creation.moved) == ([1], [1])
    gone = Creations(lost=[0], error=ValueError("no node has x"))
    with pytest.raises(ray_cluster.WorkerLostError, match="its node is lost, and no node has x"):
        RayActors([Actor()], gone, "describe").restart(0)


def test_actors_that_do_not_start_are_an_error(library, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_START_SECONDS", 0.0)
    library.available_resources = lambda: {"CPU": 0.5}
    library.wait = lambda calls, num_returns, timeout: (calls[1:], calls[:1])
    with pytest.raises(OSError, match="1 of 2 actors have not started: 0.5 CPUs of the Ray cluster are free; end what"):
        RayActors([Actor(), Actor()], None, "describe")._wait_for_cpus()
    library.wait = lambda calls, num_returns, timeout: (calls, [])
    assert RayActors([Actor()], None, "describe")._wait_for_cpus() is None


def test_a_worker_that_died_for_good_is_created_again(library, monkeypatch):
    monkeypatch.setattr(ray_cluster.time, "sleep", lambda seconds: None)
    # ActorDiedError is a RayActorError in Ray.
    died = type("ActorDiedError", (library.exceptions.RayActorError,), {})
    library.exceptions.ActorDiedError = died
    library.get = lambda call, timeout=None: call()
    library.kill = lambda actor: None
    creation = Creations(lost=())
    actors = RayActors([Actor(), Actor(died("gone"))], creation, "describe")
    actors.restart(1)
    assert (creation.created, creation.moved) == ([1], [])
    assert actors.receive(actors.send(1, "describe")) == "facts"
    served = RayActors([Actor(died("gone"))], None, "describe")
    with pytest.raises(ray_cluster.WorkerLostError, match="its service has ended"):
        served.restart(0)


def test_workers_reserve_no_more_than_their_node_has(library, monkeypatch):
    monkeypatch.setattr(ray_cluster, "nodes", lambda: [ray_cluster.Node("a", "a", 2.0)])
    reserved: list[float] = []

    def options(**given):
        reserved.append(given["num_cpus"])
        return SimpleNamespace(remote=lambda *words: None)

    library.remote = lambda kind: SimpleNamespace(options=options)
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *words, **more: None)
    library.util = SimpleNamespace(scheduling_strategies=strategies)
    creation = ray_cluster.Creation(dict, [1, 2, 3], [[], [], []], None)
    for worker in range(3):
        creation.create(worker)
    assert 1.99 < sum(reserved) <= 2
