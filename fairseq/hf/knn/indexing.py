"""The index and the clusters of a store: what a user leaves open follows from the store's size."""

from __future__ import annotations

from fairseq.hf.knn.stores import StorePlace, index_name
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.preflight import StoreShape
from fairseq.memory.retomaton.cluster_config import ClusterConfig

_ROWS_PER_LIST = 100
_MOST_LISTS = 4096
_CODE_BYTES = 64
_LEAST_COMPRESSED = 256  # compression tells 256 patterns apart and learns them from as many keys


def index_config(
    place: StorePlace,
    store: StoreShape,
    *,
    index: str | None = None,
    ncentroids: int | None = None,
    code_size: int | None = None,
    probe: int = 32,
    num_keys_to_add_at_a_time: int = 1_000_000,
    use_faiss_cpu: bool = False,
) -> BuildConfig:
    """Options of the index over a store.

    Args:
        index: its kind; by default ivfpq, of a store too small for it flat.
        ncentroids: its lists; by default 4096, or one for 100 rows if that is fewer.
        code_size: bytes of a key; by default 64, or the next divisor of the width.
    """
    compresses = len(store) >= _LEAST_COMPRESSED or ncentroids or code_size
    return BuildConfig(
        dstore_mmap=place.prefix,
        faiss_index=index_name(place.prefix),
        index=index or ("ivfpq" if compresses else "flat"),
        ncentroids=ncentroids or min(_MOST_LISTS, max(1, len(store) // _ROWS_PER_LIST)),
        code_size=code_size or max(size for size in range(1, _CODE_BYTES + 1) if store.dim % size == 0),
        probe=probe,
        num_keys_to_add_at_a_time=num_keys_to_add_at_a_time,
        dstore_size=place.rows,
        dimension=place.dim,
        dstore_fp16=place.rows is not None,
        use_faiss_cpu=use_faiss_cpu,
    )


def cluster_config(
    place: StorePlace,
    *,
    clusters: str | None = None,
    num_clusters: int | None = None,
    sample_size: int = 20_000_000,
) -> ClusterConfig:
    """Options of the clusters of a store's keys.

    Args:
        clusters: their file; by default beside the store.
        num_clusters: by default one for 100 rows.
        sample_size: keys that they are learned from, at most.
    """
    return ClusterConfig(
        dstore_mmap=place.prefix,
        clusters=clusters,
        num_clusters=num_clusters,
        sample_size=sample_size,
        dstore_size=place.rows,
        dimension=place.dim,
        dstore_fp16=place.rows is not None,
    )
