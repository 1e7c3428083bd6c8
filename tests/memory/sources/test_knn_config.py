"""The retrieval flags as users type them."""

import pytest

from fairseq.config import FlagParser, build
from fairseq.memory.sources.config import KnnConfig


def parsed(*words: str) -> KnnConfig:
    parser = FlagParser("test", "")
    parser.add_config(KnnConfig)
    return build(KnnConfig, parser.parse(words))


def test_published_flags():
    words = "--dstore-filename d --indexfile i --k 8 --lmbda 0.25 --dstore-size 99 --probe 32 --softmax-temp 10"
    config = parsed(*words.split(), "--faiss-metric-type", "ip", "--dstore_fp16", "--move-dstore-to-mem")
    assert (config.num_neighbors, config.weight, config.dstore_size, config.probe) == (8, 0.25, 99, 32)
    assert (config.temperature, config.faiss_metric_type) == (10.0, "ip")
    assert config.dstore_fp16
    assert config.move_dstore_to_mem
    assert parsed("--knn-temp", "3").temperature == 3.0


@pytest.mark.parametrize(
    ("words", "similarity"),
    [
        ((), "recompute"),
        (("--no-load-keys",), "index"),
        (("--knn-sim-func", "do_not_recomp_l2"), "index"),
        (("--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"), "index"),
        (("--knn-sim-func", "dot"), "dot"),
    ],
)
def test_where_the_similarity_comes_from(words, similarity):
    assert parsed(*words).similarity == similarity


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": 1.3}, r"--lmbda 1.3 is not in \[0, 1\]; 0 means the model alone"),
        ({"weight": float("nan")}, r"--lmbda nan is not in \[0, 1\]"),
        ({"temperature": 0.0}, "--softmax-temp must be at least 1e-06, got 0.0; 1 changes nothing"),
        ({"temperature": float("nan")}, "--softmax-temp must be at least 1e-06, got nan"),
        ({"temperature": float("inf")}, r"--softmax-temp must be at most 1000000000.0, got inf"),
        ({"search_memory": float("inf")}, "--search-memory must be at most 1000000.0, got inf"),
        ({"search_memory": 0.0}, "--search-memory must be at least 1e-06, got 0.0; it is in GB, 2 is the default"),
        ({"num_neighbors": 0}, "--k must be at least 1, got 0"),
        ({"probe": 0}, "--probe must be at least 1, got 0"),
        ({"dstore_size": 0}, "--dstore-size must be at least 1, got 0"),
        ({"no_load_keys": True, "knn_sim_func": "dot"}, "--knn-sim-func dot needs the full keys"),
    ],
)
def test_impossible_settings(more, message):
    with pytest.raises(ValueError, match=message):
        KnnConfig(**more)
