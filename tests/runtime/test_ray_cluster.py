"""Errors of a cluster in one line, and workers that are started again; Ray itself is a stand-in."""

from __future__ import annotations

import sys
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
        call = SimpleNamespace(remote=lambda: raising(error) if error else lambda: "facts")
        self.describe = self.__ray_ready__ = call


def test_a_worker_that_died_for_good_is_created_again(library, monkeypatch):
    monkeypatch.setattr(ray_cluster.time, "sleep", lambda seconds: None)
    # ActorDiedError is a RayActorError in Ray.
    died = type("ActorDiedError", (library.exceptions.RayActorError,), {})
    library.exceptions.ActorDiedError = died
    library.get = lambda call, timeout=None: call()
    created: list[int] = []

    def create(worker: int) -> Actor:
        created.append(worker)
        return Actor()

    actors = RayActors([Actor(), Actor(died("gone"))], create, "describe")
    actors.restart(1)
    assert created == [1]
    assert actors.receive(actors.send(1, "describe")) == "facts"
    served = RayActors([Actor(died("gone"))], None, "describe")
    with pytest.raises(ray_cluster.WorkerLostError, match="its service has ended"):
        served.restart(0)
