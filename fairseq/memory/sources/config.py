"""Options for kNN retrieval and interpolation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fairseq.config import LARGEST_COUNT, flag, flag_names, require_at_least, require_within
from fairseq.runtime.config import check_target

TEMPERATURES = (1e-6, 1e9)
"""Smallest and largest divisor of similarities: float32 makes infinities or zeros of them beyond."""


def check_search_on(target: str | None, num_workers: int | None) -> None:
    """Raise ValueError for values of --search-on and --search-workers that are impossible."""
    require_within(1, LARGEST_COUNT, search_workers=num_workers)
    if target is not None:
        check_target("--search-on", target)
    elif num_workers is not None:
        raise ValueError(f"--search-workers {num_workers} belongs to --search-on: give --search-on ray, or drop it")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Neighbours from a datastore (kNN-LM, arXiv 1911.00172)."""

    num_neighbors: int = flag("--k", default=1024)
    """Neighbours fetched per position."""
    weight: float = flag("--lmbda", default=0.0)
    """Share of the neighbours in the probability, 0 to 1; 0 is the model alone."""
    temperature: float = flag("--softmax-temp", "--knn-temp", default=1.0)
    """Divides the similarities before they become probabilities."""
    dstore_filename: str | None = flag("--dstore-filename", default=None)
    """Prefix of the datastore."""
    dstore_size: int | None = flag("--dstore-size", default=None)
    """Rows of the datastore; known for stores of ours, checked against the files of others."""
    dstore_fp16: bool = flag("--dstore-fp16", default=False)
    """The datastore's keys are float16."""
    dstore_bf16: bool = flag("--dstore-bf16", default=False)
    """The datastore's keys are bfloat16."""
    strict_model: bool = flag("--strict-model", default=False)
    """Reject a datastore that another model saved, which is a warning by default."""
    indexfile: str | None = flag("--indexfile", default=None)
    """The faiss index over the datastore; the ending .l2, .ip or .cos is optional."""
    faiss_metric_type: str = flag("--faiss-metric-type", default="l2", choices=("l2", "ip", "cos"))
    """Metric of the index: minus the squared distance, inner product or cosine."""
    knn_sim_func: str | None = flag("--knn-sim-func", default=None, choices=("do_not_recomp_l2", "dot"))
    """Similarity of a neighbour: by default the metric, recomputed from the full keys; do_not_recomp_l2 takes what the
    index (which keeps compressed keys) computed; dot is the inner product with the full keys whatever the metric."""
    no_load_keys: bool = flag("--no-load-keys", default=False)
    """Take the index's similarities and never touch the full keys, which may then be missing on disk."""
    probe: int = flag("--probe", default=8)
    """Lists of the index that are searched per query: more finds more and takes longer."""
    index_mmap: bool = flag("--index-mmap", default=False)
    """Leave the lists of the index on disk and read them as they are visited, for an index larger than the memory."""
    use_faiss_cpu: bool = flag("--use-faiss-cpu", default=False)
    """Search the index on the CPU even where faiss could on a GPU."""
    search_memory: float = flag("--search-memory", default=2.0)
    """GB that a search of the keys themselves (no --indexfile) may take; with less, the keys are read more often."""
    search_on: str | None = flag("--search-on", default=None)
    """Search by Ray actors, each with a range of the datastore's rows: ray starts them on this machine,
    ray://HOST:PORT in a running cluster. The neighbours are the same."""
    search_workers: int | None = flag("--search-workers", default=None)
    """Actors of --search-on; by default one for each shard or node, whichever is more."""
    move_dstore_to_mem: bool = flag("--move-dstore-to-mem", default=False)
    """Read the datastore into memory first."""

    def __post_init__(self) -> None:
        require_within(1, LARGEST_COUNT, k=self.num_neighbors, probe=self.probe)
        require_within(1e-6, 1e6, hint="it is in GB, 2 is the default", search_memory=self.search_memory)
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"--lmbda {self.weight} is not in [0, 1]; 0 means the model alone")
        spelling = next(flag_names(field)[0] for field in fields(self) if field.name == "temperature")
        named: dict[str, Any] = {spelling.removeprefix("--"): self.temperature}
        require_within(*TEMPERATURES, hint="1 changes nothing", **named)
        require_at_least(1, hint="our own stores need none", dstore_size=self.dstore_size)
        check_search_on(self.search_on, self.search_workers)
        if self.dstore_fp16 and self.dstore_bf16:
            raise ValueError("--dstore-fp16 and --dstore-bf16 exclude each other; leave one out")
        if self.no_load_keys and self.knn_sim_func == "dot":
            raise ValueError("--knn-sim-func dot needs the full keys, --no-load-keys forbids them; leave one out")

    @property
    def key_dtype(self) -> str:
        """Type of the keys of a store that is written."""
        return "float16" if self.dstore_fp16 else "bfloat16" if self.dstore_bf16 else "float32"

    @property
    def similarity(self) -> str:
        """Origin of a neighbour's score: ``recompute``, ``index`` or ``dot`` (see ExternalMemory)."""
        if self.knn_sim_func == "dot":
            return "dot"
        return "index" if self.no_load_keys or self.knn_sim_func == "do_not_recomp_l2" else "recompute"
