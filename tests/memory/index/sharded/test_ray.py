"""Ray itself, started once: actors find what one search finds, also when one of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.sharded.opening import open_sharded_index, serve
from fairseq.memory.index.sharded.ranges import SearchSettings
from fairseq.runtime import ray_cluster

try:
    ray = ray_cluster.ray_library()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def cluster():
    """Address of a local cluster with files in a folder of its own, whose name is short for the sake of sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield ray_cluster.connect("ray")
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    keys = np.random.default_rng(0).standard_normal((500, 8), dtype=np.float32)
    keys[400:410] = keys[:10]
    prefix = tmp_path_factory.mktemp("store") / "d"
    with DatastoreWriter(prefix, 500, 8, "float16", {}) as writer:
        writer.append(keys, np.arange(500))
        writer.finish()
    return Datastore.open(prefix)


def test_actors_find_what_one_search_finds_when_killed_too(cluster, store, capfd):
    query_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    expected = ExactIndex(store.keys).search(query_ND, 300)
    index, actors, address = serve(store, "ray", SearchSettings(), None, 2)
    assert address == cluster
    found = index.search(query_ND, 300)
    assert found.ids_NK.equal(expected.ids_NK)
    assert found.scores_NK.equal(expected.scores_NK)
    killed = ray.get(actors._actors[1].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(killed, signal.SIGKILL)
    found = index.search(query_ND, 300)
    assert found.ids_NK.equal(expected.ids_NK)
    assert found.scores_NK.equal(expected.scores_NK)
    assert capfd.readouterr().out == ""  # Ray prints a page about a worker that died
    shared = open_sharded_index(store, f"ray://{address}", SearchSettings())  # two workers, where one is the default
    assert str(shared).endswith("by 2 workers")
    with pytest.raises(ValueError, match="is served at"):
        serve(store, "ray", SearchSettings(), None, 2)
    delete(store.prefix, np.arange(3))
    with pytest.raises(ValueError, match="is older than its files"):
        open_sharded_index(Datastore.open(store.prefix), f"ray://{address}", SearchSettings())
    actors.end()
    with pytest.raises(OSError, match="stays lost"):
        shared.search(query_ND, 3)


def test_commands_run_as_tasks_and_a_lost_one_runs_again(cluster, tmp_path: Path):
    words = ["sh", "-c", f"test -e {tmp_path}/x || {{ touch {tmp_path}/x; kill -9 $$; }}; echo done"]
    ended = list(ray_cluster.run_commands([words, ["sh", "-c", "echo no >&2; exit 2"]], cpus=0.1, gpus=0, attempts=2))
    assert sorted((each.number, each.code, each.out, each.error) for each in ended) == [
        (0, 0, "done\n", ""),
        (1, 2, "", "no"),
    ]


def test_an_address_without_a_cluster_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            with other.accept()[0] as client:
                client.recv(100)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(OSError, match=f"no Ray cluster at {address} .another kind of server answers"):
            ray_cluster._join(address, {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(OSError, match=f"no Ray cluster at {address}"):
        ray_cluster._join(address, {})
