"""A Ray cluster of three nodes on this machine, of which one is killed while it searches."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.sharded.opening import open_sharded_index
from fairseq.memory.index.sharded.ranges import SearchSettings
from fairseq.runtime import ray_cluster

try:
    ray = ray_cluster.ray_library()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.slow
ROWS, DIM = 3000, 8


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one CPU, their files in a folder of their own."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        ray.shutdown()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        ray_cluster.connect(f"ray://{nodes.address}")
        yield nodes
        ray.shutdown()
        nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    prefix = tmp_path_factory.mktemp("store") / "d"
    with DatastoreWriter(prefix, ROWS, DIM, "float16", {}) as writer:
        writer.append(np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32), np.arange(ROWS))
        writer.finish()
    return Datastore.open(prefix)


def test_a_node_that_is_killed_is_replaced_and_one_whose_files_are_gone_is_an_error(cluster, store):
    query_ND = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0))
    expected = ExactIndex(store.keys).search(query_ND, 100)
    index = open_sharded_index(store, f"ray://{cluster.address}", SearchSettings())
    placed = [node.id for node in index._workers._creation._placed]
    assert len(set(placed)) == 3
    lost = next(node for node in cluster.worker_nodes if node.node_id in placed)
    searches = 0

    def remove() -> None:
        time.sleep(0.3)
        cluster.remove_node(lost, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    while remover.is_alive() or searches < 3:
        found = index.search(query_ND, 100)
        assert found.ids_NK.equal(expected.ids_NK)
        assert found.scores_NK.equal(expected.scores_NK)
        searches += 1
    remover.join()
    found = index.search(query_ND, 100)
    assert found.ids_NK.equal(expected.ids_NK)
    after = [node.id for node in index._workers._creation._placed]
    assert lost.node_id not in after
    assert sum(old != new for old, new in zip(placed, after)) == 1
    moved = placed.index(lost.node_id)
    keys = store.shards[0].names.keys
    shutil.move(keys, f"{keys}.away")
    ray.kill(index._workers._actors[moved], no_restart=False)
    with pytest.raises((OSError, ValueError), match="is not on .*, where a worker is to search it"):
        index.search(query_ND, 100)
    shutil.move(f"{keys}.away", keys)
