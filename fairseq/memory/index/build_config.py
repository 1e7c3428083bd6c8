"""What can be set about building an index over a datastore."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least
from fairseq.memory.index import INDEXES
from fairseq.registry import lookup


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """A faiss index over the keys of a datastore."""

    dstore_mmap: str = flag("--dstore_mmap")
    """Prefix of the datastore."""
    faiss_index: str = flag("--faiss_index")
    """Name of the index; the file is called NAME.l2, NAME.ip or NAME.cos."""
    dist: str = flag("--dist", default="l2", choices=("l2", "ip", "cos"))
    """Metric: squared distance, inner product or cosine."""
    index: str = flag("--index", default="ivfpq", choices=tuple(INDEXES))
    """Kind of index: ivfpq searches some lists of compressed keys, flat compares all full keys."""
    ncentroids: int = flag("--ncentroids", default=4096)
    """Lists the keys are sorted into."""
    code_size: int = flag("--code_size", default=64)
    """Bytes a compressed key takes; must divide the width."""
    probe: int = flag("--probe", default=8)
    """Lists a search visits unless it says otherwise."""
    train_size: int = flag("--train_size", "--num_keys_to_train_on", default=1_000_000)
    """Randomly chosen keys the lists and the compression are learned from, at most; 256 per list are enough."""
    seed: int = flag("--seed", default=1)
    """Chooses the training keys and starts the clustering."""
    num_keys_to_add_at_a_time: int = flag("--num_keys_to_add_at_a_time", default=500_000)
    """Keys between two points at which a killed build can go on."""
    starting_point: int = flag("--starting_point", default=0)
    """Row from which keys are still to be added. An interrupted build goes on by itself, so 0 is always right; a
    row beyond what is done would leave rows out and is an error."""
    dstore_size: int | None = flag("--dstore_size", default=None)
    """Rows of the datastore; needed for files of the original programs only, checked otherwise."""
    dimension: int | None = flag("--dimension", default=None)
    """Width of the keys; needed for files of the original programs only, checked otherwise."""
    dstore_fp16: bool = flag("--dstore_fp16", default=False)
    """The datastore's keys are float16."""
    dstore_bf16: bool = flag("--dstore_bf16", default=False)
    """The datastore's keys are bfloat16."""

    def __post_init__(self) -> None:
        lookup(INDEXES, self.index, "--index")
        counts = ("ncentroids", "code_size", "probe", "train_size", "num_keys_to_add_at_a_time")
        require_at_least(1, between="_", **{name: getattr(self, name) for name in counts})
        require_at_least(0, between="_", starting_point=self.starting_point)
        own = "our own stores need none"
        require_at_least(1, between="_", hint=own, dstore_size=self.dstore_size, dimension=self.dimension)

    @property
    def factory(self) -> str:
        """The faiss factory string of the index."""
        return INDEXES[self.index].format(ncentroids=self.ncentroids, code_size=self.code_size)
