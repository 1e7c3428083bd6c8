"""Options of a server."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_within
from fairseq.web.config import AddressConfig


@dataclass(frozen=True, kw_only=True)
class ModelServerConfig(AddressConfig):
    """Answer requests in OpenAI's form with a Hugging Face model and its memories, until interrupted."""

    model: str = flag("model")
    """Folder of a decoder, or its name on the hub."""
    model_name: str | None = flag("--model-name", default=None)
    """Name of the model for clients; by default the last part of MODEL."""
    dtype: str = flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    """Type of the weights; auto is that of the file."""
    device: str = flag("--device", default="cpu")
    """Where the model computes, such as cuda."""
    store: tuple[str, ...] = flag("--store", default=())
    """Datastores of the model, each as NAME=PREFIX (or a PREFIX alone, whose name is that of its files); requests that
    name none use the first."""
    writable: bool = flag("--writable", default=False)
    """Clients may add and delete documents; no other server may write these stores meanwhile."""
    retomaton: int | None = flag("--retomaton", default=None, const=1)
    """RetoMaton: follow pointers, and search only where fewer than so many are active (1 without a number)."""
    max_knns: int = flag("--max-knns", default=1024)
    """Limit on RetoMaton's active pointers."""
    extended_mind: str | None = flag("--extended-mind", default=None)
    """Memories inside attention: a file of save_memory (.safetensors), or a text."""
    topk: int = flag("--topk", default=10)
    """Memories that each query of each head attends to."""
    k: int | None = flag("--k", default=None)
    """Neighbours of a request that states no number; by default 1024, or all rows of a smaller store."""
    weight: float = flag("--lmbda", default=0.25)
    """Their share of the probability where a request states none."""
    knn_temp: float = flag("--knn-temp", default=1.0)
    """What divides their scores where a request states nothing."""
    probe: int = flag("--probe", default=32)
    """Lists of an index that a search probes."""
    max_k: int = flag("--max-k", default=4096)
    """Most neighbours that a request may ask for."""
    max_length: int | None = flag("--max-length", default=None)
    """Most tokens of a prompt and its continuation; by default what the model reads, or 2048 where its config states
    nothing."""
    max_batch: int = flag("--max-batch", default=16)
    """Sequences that are generated at once."""
    max_waiting: int = flag("--max-waiting", default=256)
    """Requests that wait; others are answered with status 429."""
    max_body: int = flag("--max-body", default=4 << 20)
    """Bytes of a request."""
    window: int | None = flag("--window", default=None)
    """Tokens of an added document that the model reads at once; by default as --max-length, at most 1024."""
    grace_seconds: int = flag("--grace-seconds", default=30)
    """Seconds that requests get to end after the server was asked to stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, LARGEST_COUNT, k=self.k, probe=self.probe, max_k=self.max_k, max_knns=self.max_knns)
        require_within(1, LARGEST_COUNT, max_length=self.max_length, max_batch=self.max_batch, topk=self.topk)
        require_within(1, LARGEST_COUNT, max_waiting=self.max_waiting, max_body=self.max_body, retomaton=self.retomaton)
        require_within(2, LARGEST_COUNT, window=self.window)
        require_within(0, 86_400, grace_seconds=self.grace_seconds)
        require_within(0.0, 1.0, lmbda=self.weight)
        if not 0.0 < self.knn_temp < float("inf"):
            raise ValueError(f"--knn-temp must be above 0, got {self.knn_temp}; 1 leaves the scores as they are")
        if self.k is not None and self.k > self.max_k:
            raise ValueError(f"--k {self.k} is above --max-k {self.max_k}; give a larger --max-k")
        if self.retomaton is not None and not self.store:
            raise ValueError("--retomaton follows pointers in a store; give --store NAME=PREFIX")
        if self.writable and not self.store and self.extended_mind is None:
            raise ValueError("--writable needs something to write; give --store NAME=PREFIX or --extended-mind FILE")
        self.named_stores()

    def named_stores(self) -> dict[str, str]:
        """Prefix of each store by name. Raises: ValueError when two have the same."""
        found: dict[str, str] = {}
        for each in self.store:
            name, equals, prefix = each.partition("=")
            prefix = prefix if equals else each
            name = name if equals else each.rstrip("/").rpartition("/")[2]
            if not name or not prefix or "/" in name:
                raise ValueError(f"--store {each!r} must be NAME=PREFIX, the name without slashes")
            if name in found or name == MIND:
                raise ValueError(f"--store has the name {name!r} twice; give each store a name of its own")
            found[name] = prefix
        return found


MIND = "extended-mind"
"""Name of the memories inside attention among the stores."""
