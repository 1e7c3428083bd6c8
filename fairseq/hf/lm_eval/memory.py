"""The memory that model_args describe, put into a model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fairseq.hf.attention.wrapper import ExtendedMind
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.extended_mind.storage import load_memory
from fairseq.registry import did_you_mean

_ALMOST = 0.8  # similarity of names, as difflib has it, from which on one is a misspelling of the other


@dataclass(frozen=True)
class MemoryArguments:
    """What ``--model_args`` may say about memories, by the names of ``KNNWrapper``, ``RetomatonWrapper`` and
    ``ExtendedMind``."""

    dstore_dir: str | None = None
    """Folder or prefix of a datastore; None for none."""
    k: int | None = None
    """Neighbours per position; None for 1024, or all rows of a smaller store."""
    lmbda: float = 0.25
    """Their share of the probability."""
    knn_temp: float = 1.0
    """Divides their scores."""
    knn_keytype: str | None = None
    """Place of the keys in the model."""
    indexfile: str | None = None
    """The index, if it has another name than the store's."""
    probe: int = 32
    """Lists of the index that a search probes."""
    retomaton: bool = False
    """Follow pointers, and search only where too few are active."""
    min_knns: int = 1
    """Active pointers needed to skip a search."""
    max_knns: int = 1024
    """Limit on active pointers."""
    members: str | None = None
    """File of RetoMaton's clusters; None for the one beside the store, if any."""
    extended_mind: str | None = None
    """Memories inside attention: a file that ``save_memory`` wrote (.safetensors), or a text; None for none."""
    topk: int = 10
    """Memories that each query of each head attends to."""
    mask_by_sim: bool = False
    """Leave out memories that are not similar enough."""
    sim_threshold: float = 0.25
    """Cosine similarity that is enough."""

    def __post_init__(self) -> None:
        if self.dstore_dir is None and self.extended_mind is None:
            raise ValueError(
                "the model fairseq-memory needs a memory in --model_args: dstore_dir=PREFIX or extended_mind=FILE; "
                "--model hf evaluates a model without one"
            )
        if self.dstore_dir is None and (self.retomaton or self.k is not None):
            name = "retomaton" if self.retomaton else "k"
            raise ValueError(f"{name} is about a datastore, and --model_args name none; give dstore_dir=PREFIX")
        if self.extended_mind is not None and not Path(self.extended_mind).is_file():
            raise ValueError(
                f"extended_mind={self.extended_mind}: no such file; name a text, or what save_memory wrote"
            )

    @classmethod
    def split(cls, given: Mapping[str, Any], known: Collection[str] = ()) -> tuple[MemoryArguments, dict[str, Any]]:
        """Those among all of a model's arguments, and the others.

        Args:
            known: names of the harness's own arguments; transformers' models take more.
        Raises: ValueError for a name that is almost one of these, and for arguments without a memory.
        """
        names = {field.name for field in fields(cls)}
        mine = {name: value for name, value in given.items() if name in names and value is not None}
        others = {name: value for name, value in given.items() if name not in names}
        for name in others.keys() - set(known):
            if difflib.get_close_matches(name, names, 1, _ALMOST):
                raise ValueError(f"unknown name {name!r} in --model_args{did_you_mean(name, names)}")
        return cls(**mine), others

    def described(self) -> dict[str, Any]:
        """What differs from the defaults, for the record of a run."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@contextlib.contextmanager
def attached_memory(model: Any, tokenizer: Any, arguments: MemoryArguments) -> Iterator[None]:
    """While the block runs, the model has the memory. Raises: ValueError when something is missing or does not fit."""
    with contextlib.ExitStack() as attached:
        if arguments.extended_mind is not None:
            attached.enter_context(_mind(model, tokenizer, arguments))
        if arguments.dstore_dir is not None:
            attached.enter_context(_wrapper(tokenizer, arguments)(model))
        yield


def _wrapper(tokenizer: Any, arguments: MemoryArguments) -> KNNWrapper:
    settings: dict[str, Any] = {
        "dstore_dir": arguments.dstore_dir,
        "k": arguments.k,
        "lmbda": arguments.lmbda,
        "knn_temp": arguments.knn_temp,
        "knn_keytype": arguments.knn_keytype,
        "indexfile": arguments.indexfile,
        "probe": arguments.probe,
        "tokenizer": tokenizer,
    }
    if not arguments.retomaton:
        return KNNWrapper(**settings)
    return RetomatonWrapper(
        min_knns=arguments.min_knns, max_knns=arguments.max_knns, members=arguments.members, **settings
    )


def _mind(model: Any, tokenizer: Any, arguments: MemoryArguments) -> ExtendedMind:
    mind = ExtendedMind(
        model,
        tokenizer=tokenizer,
        topk=arguments.topk,
        mask_by_sim=arguments.mask_by_sim,
        sim_threshold=arguments.sim_threshold,
    )
    assert arguments.extended_mind is not None
    path = Path(arguments.extended_mind)
    if path.suffix == ".safetensors":
        mind.set_memory(load_memory(path))
    else:
        mind.set_memory(path.read_text(encoding="utf-8"))
    return mind
