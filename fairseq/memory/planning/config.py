"""Options of ``fairseq-datastore plan``."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, int_list, require_at_least, require_within
from fairseq.memory.datastore.config import KEY_TYPES, count
from fairseq.memory.gnn.config import GnnConfig, GraphConfig, window


@dataclass(frozen=True, kw_only=True)
class GnnPlanConfig:
    """Options of a plan for GNN-LM."""

    gnn_k: tuple[int, ...] = flag("--gnn-k", default=(), parse=int_list)
    """Neighbours of a token, such as 32,128,1024: plan GNN-LM's files, searches and training over the keys too."""
    graph_layers: int = flag("--graph-layer", default=3)
    """Layers of GNN-LM; they are as wide as the keys."""
    graph_heads: int = flag("--graph-attention-heads", default=8)
    """Attention heads of GNN-LM."""
    neighbor_context: tuple[int, ...] = flag("--neighbor-context", default=(2, 2), parse=window)
    """Positions read to the left and to the right of a neighbour: one number for both, or (left,right)."""
    gnn_code_bytes: int = flag("--gnn-code-bytes", default=128)
    """Bytes of a coded feature, or of a coded state."""
    gnn_tokens: int = flag("--gnn-tokens", default=256)
    """Tokens of a block of training."""
    gnn_distinct: float = flag("--gnn-distinct", default=1.0)
    """Share of a block's neighbours that are distinct positions; 1 is the most expensive."""
    flops: float | None = flag("--flops", default=None)
    """FLOP per second of the machine that trains, such as 150e12; by default that of a product on this one."""

    @property
    def graph(self) -> GraphConfig:
        """The windows."""
        return GraphConfig(neighbor_context=self.neighbor_context)

    @property
    def network(self) -> GnnConfig:
        """The layers."""
        return GnnConfig(graph_layer=self.graph_layers, graph_attention_heads=self.graph_heads)

    def require_gnn(self, keys: int, dim: int) -> None:
        """Raise ValueError for a network or codes that keys of a width cannot have."""
        require_within(1, keys, hint=f"there are --keys {keys}", gnn_k=min(self.gnn_k))
        require_within(1, keys, hint=f"there are --keys {keys}", gnn_k=max(self.gnn_k))
        require_at_least(1, gnn_tokens=self.gnn_tokens, gnn_code_bytes=self.gnn_code_bytes, flops=self.flops)
        require_within(1e-6, 1, hint="it is a share", gnn_distinct=self.gnn_distinct)
        self.graph, self.network.width(dim)
        if dim % self.gnn_code_bytes:
            fitting = max(size for size in range(1, self.gnn_code_bytes) if dim % size == 0)
            raise ValueError(
                f"--gnn-code-bytes {self.gnn_code_bytes} does not divide the width {dim}; give {fitting}, for example"
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(GnnPlanConfig):
    """Estimate disk, memory and time of a datastore and of each kind of index on this machine, before building any."""

    keys: int = flag("--keys", parse=count)
    """Rows of the datastore; also accepts 103e6."""
    dim: int = flag("--dim")
    """Width of the keys."""
    dtype: str = flag("--dtype", default="float32", choices=KEY_TYPES)
    """Type of the keys."""
    queries: int = flag("--queries", default=250_000, parse=count)
    """Scored tokens of the evaluation."""
    k: int = flag("--k", default=1024)
    """Neighbours per query."""
    ncentroids: int = flag("--ncentroids", default=4096)
    """Number of inverted lists."""
    code_size: int = flag("--code-size", default=64)
    """Bytes of a compressed key."""
    probe: int = flag("--probe", default=8)
    """Lists probed per query."""
    train_size: int = flag("--train-size", default=1_000_000, parse=count)
    """Largest number of training keys."""
    search_memory: float = flag("--search-memory", default=2.0)
    """Limit on the working memory of exact search, in GB."""
    folder: str = flag("--folder", default=".")
    """Folder for the files; its disk is measured."""
    json: bool = flag("--json", default=False)
    """Print a JSON object."""

    def __post_init__(self) -> None:
        require_at_least(1, keys=self.keys, dim=self.dim, queries=self.queries, k=self.k, ncentroids=self.ncentroids)
        require_at_least(1, code_size=self.code_size, probe=self.probe, train_size=self.train_size)
        require_within(1e-6, 1e6, hint="it is in GB; give 2, for example", search_memory=self.search_memory)
        if self.k > self.keys:
            raise ValueError(f"--k {self.k} is larger than --keys {self.keys}; give at most {self.keys}")
        if self.ncentroids > self.keys:
            suggested = max(1, self.keys // 100)
            raise ValueError(f"--ncentroids {self.ncentroids} is more than --keys {self.keys}; give about {suggested}")
        if self.dim % (2 * self.code_size):
            candidates = [size for size in range(1, self.dim + 1) if self.dim % (2 * size) == 0]
            nearest = min(candidates, key=lambda size: abs(size - self.code_size), default=0)
            hint = f"give {nearest}, for example" if nearest else "give an even --dim"
            raise ValueError(f"--code-size {self.code_size} does not divide half the width {self.dim}; {hint}")
        if self.gnn_k:
            self.require_gnn(self.keys, self.dim)
