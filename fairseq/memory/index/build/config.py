"""Options for building an index over a datastore."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fairseq.config import flag, require_at_least
from fairseq.memory.index import INDEXES
from fairseq.registry import lookup

# The words of a faiss factory string begin with a capital, unlike the kinds here and their misspellings.
_FACTORY = re.compile(r"[A-Z]+\w*([,(]+[A-Z]\w*\)?)*")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Options for building a faiss index over the keys of a datastore. Every field is a flag of ``build_dstore.py``.

    Raises: ValueError for a value that is impossible.

    ```python
    config = BuildConfig(
        dstore_mmap="store", faiss_index="store.index", ncentroids=8, code_size=8, no_report=True
    )
    assert config.factory(dim=16) == "IVF8,PQ8np"
    ```
    """

    dstore_mmap: str = flag("--dstore_mmap")
    """Prefix of the datastore."""
    faiss_index: str = flag("--faiss_index")
    """Name of the index; the file is called NAME.l2, NAME.ip or NAME.cos."""
    dist: str = flag("--dist", default="l2", choices=("l2", "ip", "cos"))
    """Metric: squared distance, inner product or cosine."""
    index: str = flag("--index", default="ivfpq")
    """Kind of index: ivfpq searches some lists of compressed keys, ivfsq8, ivfpq-fastscan and ivfrabitq compress them
    otherwise, flat compares all full keys; or a faiss factory string, such as HNSW32 or OPQ16_64,IVF1024,PQ16."""
    ncentroids: int = flag("--ncentroids", default=4096)
    """Lists the keys are sorted into."""
    code_size: int = flag("--code_size", default=64)
    """Bytes a compressed key takes with ivfpq and ivfpq-fastscan; must divide the width (twice as much with the
    latter)."""
    probe: int = flag("--probe", default=8)
    """Lists a search probes by default."""
    train_size: int = flag("--train_size", "--num_keys_to_train_on", default=1_000_000)
    """Randomly chosen keys the lists and the compression are learned from, at most; 256 per list are enough."""
    seed: int = flag("--seed", default=1)
    """Chooses the training keys and starts the clustering."""
    num_keys_to_add_at_a_time: int = flag("--num_keys_to_add_at_a_time", default=500_000)
    """Keys between two points from which a killed build can resume."""
    starting_point: int = flag("--starting_point", default=0)
    """Row from which keys are still to be added. An interrupted build resumes by itself, so 0 is always right; a
    row beyond what is done would skip rows and is an error."""
    dstore_size: int | None = flag("--dstore_size", default=None)
    """Rows of the datastore; needed for files of the original programs only, checked otherwise."""
    dimension: int | None = flag("--dimension", default=None)
    """Width of the keys; needed for files of the original programs only, checked otherwise."""
    dstore_fp16: bool = flag("--dstore_fp16", default=False)
    """The datastore's keys are float16."""
    dstore_bf16: bool = flag("--dstore_bf16", default=False)
    """The datastore's keys are bfloat16."""
    drop_nonfinite: bool = flag("--drop_nonfinite", default=False)
    """Drop keys that hold NaN or infinity, which are rejected otherwise: such rows are never found."""
    num_shards: int = flag("--num_shards", default=1)
    """Parts the rows are cut into, to be encoded by as many commands with the same other flags."""
    shard_id: int = flag("--shard_id", default=0)
    """The part this command encodes, from 0. The command that ends last assembles the index."""
    merge: bool = flag("--merge", default=False)
    """Only put the index together, of the parts that --num_shards commands left beside it."""
    on_disk: bool = flag("--on_disk", default=False)
    """Keep the lists in a file of their own (NAME.l2.ivfdata), which is made, and searched, without being read into
    memory."""
    graph_threads: int = flag("--graph_threads", default=1)
    """Threads that link a graph (HNSW). With more than one the graph, and what a search finds, differ a little from
    build to build."""
    use_faiss_cpu: bool = flag("--use-faiss-cpu", default=False)
    """Leave a GPU alone. Otherwise lists are made, and keys sorted into them, on the first one."""

    no_report: bool = flag("--no-report", default=False)
    """Do not measure the index when it is built."""
    report_queries: int = flag("--report_queries", default=512)
    """Keys whose neighbours are searched to measure the index; keys that training has not seen where there are any."""
    report_k: int = flag("--report_k", default=1024)
    """Neighbours per query of that measurement."""
    report_probes: tuple[int, ...] = flag("--report_probes", default=(1, 8, 32, 128))
    """Numbers of probed lists to measure it with, beside --probe."""
    report_evaluation: str | None = flag("--report_evaluation", default=None)
    """Words of an eval_lm.py command (data, --path, --k, --lmbda, ...): report the perplexity with the index and with
    exact search."""

    def __post_init__(self) -> None:
        if self.faiss_index.endswith("/"):
            raise ValueError(
                f"--faiss_index {self.faiss_index} names a folder; give the name of an index in it, such as "
                f"{self.faiss_index}index"
            )
        if not _FACTORY.fullmatch(self.index):
            lookup(INDEXES, self.index, "--index")
        counts = ["ncentroids", "code_size", "probe", "train_size", "num_keys_to_add_at_a_time", "num_shards"]
        counts += ["graph_threads", "report_queries", "report_k"]
        require_at_least(1, between="_", **{name: getattr(self, name) for name in counts})
        require_at_least(0, between="_", starting_point=self.starting_point)
        own = "our own stores need none"
        require_at_least(1, between="_", hint=own, dstore_size=self.dstore_size, dimension=self.dimension)
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(f"--shard_id {self.shard_id} is not in 0..{self.num_shards - 1} (--num_shards)")
        if self.merge and self.num_shards == 1:
            raise ValueError("--merge requires --num_shards (how many parts to merge)")

    def factory(self, dim: int) -> str:
        """The faiss factory string for keys of width ``dim``."""
        sizes = {"ncentroids": self.ncentroids, "code_size": self.code_size, "half_codes": 2 * self.code_size}
        return INDEXES[self.index].format(dim=dim, **sizes) if self.index in INDEXES else self.index
