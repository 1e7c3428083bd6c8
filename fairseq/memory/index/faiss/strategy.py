"""The choice between the ways of searching a faiss index: one pure function and all its thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

# So few are searched by one thread: faiss's threads and torch's, which wait for work in a loop, would take the CPU
# cores from each other at every step of a generation.
_FEW_QUERIES = 4
# Many neighbours: more than this part of an average list. Then no list alone gives a threshold that prunes.
_LISTS_OF_K = 4
# The searches for many neighbours keep a row and its score in one integer.
_MOST_ROWS = 1 << 32
# Searches in bulk number keys, and the places that fill up their lists, by 31 bits.
_MOST_BULK_ROWS = 1 << 30


class SearchStrategy(Enum):
    """A way of searching an index."""

    GPU = auto()
    """Copies of the index on the GPUs."""
    LARGE_K_IN_BULK = auto()
    """8-bit products over decoded lists (``lists.bulk_search``), equals in the order of their rows."""
    LARGE_K_BY_TABLES = auto()
    """Sums of table entries over the codes in RAM (``lists.adc_search``)."""
    LISTS_IN_BULK = auto()
    """The same, ties at place k as faiss has them."""
    FAISS_ON_ONE_THREAD = auto()
    """faiss itself, on the calling thread."""
    FAISS = auto()
    """faiss itself, on all threads."""

    @property
    def decodes_lists(self) -> bool:
        """True for searches that decode whole lists for all queries together."""
        return self in (SearchStrategy.LARGE_K_IN_BULK, SearchStrategy.LISTS_IN_BULK)


@dataclass(frozen=True)
class IndexTraits:
    """The properties of an index that its search strategy depends on."""

    num_keys: int
    num_lists: int = 0
    """Inverted lists; 0 without lists."""
    num_probed: int = 0
    """Lists that a query probes; 0 without lists."""
    has_lists: bool = False
    bulk_queries_per_list: int = 0
    """Queries per list from which decoding the lists (``lists.decoded_lists``) pays; 0 where they cannot be decoded."""
    codes_in_ram: bool = False
    """The lists hold product-quantized keys of 8-bit codes in RAM, rather than in a mapped file."""
    on_gpu: bool = False


def choose_strategy(traits: IndexTraits, num_queries: int, k: int) -> SearchStrategy:
    """The fastest way of searching an index for the k nearest keys of a number of queries."""
    if traits.on_gpu:
        return SearchStrategy.GPU
    least = traits.bulk_queries_per_list * traits.num_lists
    in_bulk = 0 < least <= num_queries * traits.num_probed and traits.num_keys < _MOST_BULK_ROWS
    if k * _LISTS_OF_K > traits.num_keys / max(1, traits.num_lists) and traits.num_keys < _MOST_ROWS:
        if in_bulk:
            return SearchStrategy.LARGE_K_IN_BULK
        if traits.codes_in_ram:
            return SearchStrategy.LARGE_K_BY_TABLES
    return SearchStrategy.LISTS_IN_BULK if in_bulk else faiss_strategy(traits, num_queries)


def faiss_strategy(traits: IndexTraits, num_queries: int) -> SearchStrategy:
    """The number of threads that faiss's own search should use."""
    few = num_queries <= _FEW_QUERIES and traits.has_lists
    return SearchStrategy.FAISS_ON_ONE_THREAD if few else SearchStrategy.FAISS
