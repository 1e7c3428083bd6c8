"""Options of the explorer. No torch here: the flags are made from these."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fairseq.config import flag, require_at_least, require_within
from fairseq.memory.sources.config import TEMPERATURES

MOST_EXPORTED = 10_000
"""Tokens that an export holds: with the details of each it takes some kilobytes a token."""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """What is done with the explanation."""

    export: str | None = flag("--export", default=None)
    """Write the explanation to this file, .html for one page that needs nothing else or .json, and exit."""
    export_first: int = flag("--export-first", default=0)
    """First token of the text that --export writes, from 0."""
    export_tokens: int = flag("--export-tokens", default=2000)
    """Tokens that --export writes at most."""

    def __post_init__(self) -> None:
        if self.export is not None and not self.export.endswith((".html", ".json")):
            raise ValueError(f"--export {self.export} must end in .html or .json; that says what is written")
        require_at_least(0, export_first=self.export_first)
        require_within(1, MOST_EXPORTED, export_tokens=self.export_tokens)


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """Explore the neighbours that --save-retrieval kept."""

    retrievals: tuple[str, ...] = flag("retrievals", default=())
    """The file; or those of all shards of one evaluation."""
    dictionary: str | None = flag("--dictionary", default=None)
    """Dictionary of the text; by default where the evaluation found it."""
    dstore_filename: str | None = flag("--dstore-filename", default=None)
    """Prefix of the datastore; by default where it lay."""


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """Translations to explore."""

    sentences: int = flag("--sentences", default=100)
    """Sentences of the split that are translated, from the first."""

    def __post_init__(self) -> None:
        require_at_least(1, sentences=self.sentences)


@dataclass(frozen=True, kw_only=True)
class HfTextConfig:
    """A transformers model and the text that it reads."""

    model: str | None = flag("--model", default=None)
    """Folder or name of the model, with its tokenizer."""
    text: str | None = flag("--text", default=None)
    """Text file to score."""
    device: str = flag("--device", default="cpu")
    """Device that the model runs on, such as cuda."""
    block_size: int | None = flag("--block-size", default=None)
    """Tokens of a window; by default what the model reads, at most 1024."""
    stride: int | None = flag("--stride", default=None)
    """Tokens from one window's start to the next; by default half of --block-size, so that at least as many tokens are
    read before each."""
    lines_per_group: int = flag("--lines-per-group", default=1000)
    """Lines that are one text: no window reaches over a group's end."""

    def __post_init__(self) -> None:
        for name, value, what in (("--model", self.model, "FOLDER"), ("--text", self.text, "FILE")):
            if not value:
                raise ValueError(f"give {name} {what}: what is explored is not known otherwise")
        if not os.path.isfile(str(self.text)):
            raise ValueError(f"--text: no file {self.text!r}; name a text file")
        require_at_least(1, lines_per_group=self.lines_per_group, stride=self.stride)
        require_at_least(2, block_size=self.block_size)


@dataclass(frozen=True, kw_only=True)
class HfMemoryConfig:
    """A datastore for a transformers model: kNN-LM, or RetoMaton."""

    dstore_dir: str | None = flag("--dstore-dir", default=None)
    """Folder of the datastore and its index, or the datastore's prefix."""
    indexfile: str | None = flag("--indexfile", default=None)
    """The index, if it has another name than the datastore's."""
    k: int | None = flag("--k", default=None)
    """Neighbours per position; by default 1024, or all rows of a smaller datastore."""
    weight: float = flag("--lmbda", default=0.25)
    """Share of the neighbours, above 0 and at most 1."""
    knn_temp: float = flag("--knn-temp", "--softmax-temp", default=1.0)
    """Divides the similarities."""
    probe: int = flag("--probe", default=32)
    """Lists of the index that a search probes."""
    knn_keytype: str | None = flag("--knn-keytype", default=None)
    """last_ffn_input (default), last_ffn_output or final_hidden."""
    retomaton: bool = flag("--retomaton", default=False)
    """Follow pointers, and search where too few are active (arXiv 2201.12431)."""
    min_knns: int = flag("--min-knns", default=1)
    """Active pointers that make a search unnecessary (--retomaton)."""
    max_knns: int = flag("--max-knns", default=1024)
    """Most active pointers (--retomaton)."""
    clusters: str | None = flag("--clusters", "--members", default=None)
    """File of the clusters (--retomaton); by default the one beside the datastore, if any."""

    def __post_init__(self) -> None:
        if not self.dstore_dir:
            raise ValueError("give --dstore-dir FOLDER: which memory is explored is not known otherwise")
        if not 0.0 < self.weight <= 1.0:
            raise ValueError(f"--lmbda {self.weight} is not above 0 and at most 1; with 0 no memory is read")
        require_within(*TEMPERATURES, hint="1 changes nothing", knn_temp=self.knn_temp)
        require_at_least(1, k=self.k, probe=self.probe, min_knns=self.min_knns, max_knns=self.max_knns)
        if self.clusters and not self.retomaton:
            raise ValueError(f"--clusters {self.clusters} are RetoMaton's; give --retomaton too")


@dataclass(frozen=True, kw_only=True)
class MindConfig:
    """Documents that a transformers model reads as memories inside attention (Extended Mind, arXiv 2406.02332)."""

    memory: tuple[str, ...] = flag("--memory", default=())
    """Text files, each a document of the memory; or one file that save_memory wrote (.safetensors)."""
    topk: int = flag("--topk", default=10)
    """Memories that each query of each head attends to."""
    mask_by_sim: bool = flag("--mask-by-sim", default=False)
    """Leave out memories that are less similar than --sim-threshold."""
    sim_threshold: float = flag("--sim-threshold", default=0.25)
    """Cosine similarity that memories must exceed with --mask-by-sim."""
    positions: str = flag("--positions", default="origin", choices=("origin", "relative"))
    """Positions of the memories: all right before the text, or one after the other before it."""

    def __post_init__(self) -> None:
        if not self.memory:
            raise ValueError("give --memory FILE ...: which documents are the memory is not known otherwise")
        for path in self.memory:
            if not os.path.isfile(path):
                raise ValueError(f"--memory: no file {path!r}; name text files")
        require_at_least(1, topk=self.topk)
        require_within(-1.0, 1.0, sim_threshold=self.sim_threshold)
