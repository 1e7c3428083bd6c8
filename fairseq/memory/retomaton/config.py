"""Options of RetoMaton, an automaton over a datastore."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least

SEARCHES = ("auto", "needed", "ahead")


@dataclass(frozen=True, kw_only=True)
class RetomatonConfig:
    """Neighbours by pointers and clusters, searched only where these run dry (RetoMaton, arXiv 2201.12431)."""

    retomaton: bool = flag("--retomaton", default=False)
    """Follow pointers from the last neighbours to the next rows, and search only where these are too few."""
    min_knns: int = flag("--min-knns", default=1)
    """Active pointers needed for a search to be saved; more than --max-knns searches at every position."""
    max_knns: int = flag("--max-knns", default=1024)
    """Active pointers, at most: successors of the nearest neighbours first, then members of their clusters."""
    no_pointer: bool = flag("--no-pointer", default=False)
    """Follow nothing: every position is searched, which is kNN-LM."""
    clusters: str | None = flag("--clusters", "--members", default=None)
    """Clusters of the datastore's rows: a file of build_dstore.py --cluster_dstore, or a members_*.pkl of
    knn-transformers."""
    retomaton_carry: bool = flag("--retomaton-carry", default=False)
    """Keep the active pointers from one block of the text to the next, which are then read one after the other."""
    retomaton_search: str = flag("--retomaton-search", default="auto", choices=SEARCHES)
    """Time of the searches: needed, each when its turn comes; ahead, all at once before, which costs less where
    the keys themselves are searched (no --indexfile). The figures are the same."""

    def __post_init__(self) -> None:
        require_at_least(1, min_knns=self.min_knns, max_knns=self.max_knns)
        if self.no_pointer and self.clusters:
            raise ValueError(
                f"--no-pointer follows nothing that --clusters {self.clusters} could extend; drop one of them"
            )
