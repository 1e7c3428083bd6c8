"""Options of serving a datastore and of running its shards on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_within
from fairseq.memory.datastore.config import StoreConfig
from fairseq.runtime.config import check_target


@dataclass(frozen=True, kw_only=True)
class ServeConfig(StoreConfig):
    """Keep Ray actors that search a datastore, for all evaluations that name its cluster, until interrupted."""

    search_on: str = flag("--search-on", default="ray")
    """ray starts Ray on this machine, ray://HOST:PORT is a running cluster."""
    workers: int | None = flag("--workers", "--search-workers", default=None)
    """Actors; by default one for each shard of the datastore or node of the cluster, whichever is more."""
    indexfile: str | None = flag("--indexfile", default=None)
    """The faiss index, or what the names of one for each shard (NAME.partI-of-N) begin with."""
    faiss_metric_type: str = flag("--faiss-metric-type", default="l2", choices=("l2", "ip", "cos"))
    """Metric of the search."""
    probe: int = flag("--probe", default=8)
    """Lists of the index that are searched per query."""
    index_mmap: bool = flag("--index-mmap", default=False)
    """Leave the lists of the index on disk."""
    use_faiss_cpu: bool = flag("--use-faiss-cpu", default=False)
    """Search the index on the CPU even where faiss could on a GPU."""
    search_memory: float = flag("--search-memory", default=2.0)
    """GB that each actor may take for a search without --indexfile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target("--search-on", self.search_on)
        require_within(1, LARGEST_COUNT, workers=self.workers, probe=self.probe)
        require_within(1e-6, 1e6, hint="it is in GB, 2 is the default", search_memory=self.search_memory)


@dataclass(frozen=True, kw_only=True)
class RunShardsConfig:
    """Run a command once for each shard as tasks of a Ray cluster: run-shards N -- eval_lm.py ... ({shard} is 0 to N-1,
    {num_shards} is N; without them the flags of the shard are added)."""

    num_shards: int = flag("num_shards")
    """Number of shards."""
    run_on: str = flag("--run-on", default="ray")
    """ray starts Ray on this machine, ray://HOST:PORT is a running cluster."""
    cpus: float = flag("--cpus", default=1.0)
    """CPUs of each command, which are also its threads; the cluster runs as many commands at a time as it has."""
    gpus: float = flag("--gpus", default=0.0)
    """GPUs of each command."""
    attempts: int = flag("--attempts", default=3)
    """Times that a command is run whose process or node is lost; it resumes."""

    def __post_init__(self) -> None:
        check_target("--run-on", self.run_on)
        require_within(1, 100_000, num_shards=self.num_shards)
        require_within(1, 1000, attempts=self.attempts)
        require_within(0.01, 1e4, cpus=self.cpus)
        require_within(0, 1e4, gpus=self.gpus)

    def command(self, words: tuple[str, ...], shard: int) -> list[str]:
        """The words that run one shard."""
        if any("{shard}" in word for word in words):
            return [w.replace("{shard}", str(shard)).replace("{num_shards}", str(self.num_shards)) for w in words]
        dash = "_" if "build" in words[0].rpartition("/")[2] else "-"
        return [*words, f"--num{dash}shards", str(self.num_shards), f"--shard{dash}id", str(shard)]
