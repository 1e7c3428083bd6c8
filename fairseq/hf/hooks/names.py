"""The names users of knn-transformers know for where a key comes from and how neighbours are scored."""

from __future__ import annotations

from enum import Enum

from fairseq.registry import lookup


class KeyType(str, Enum):
    """The place in the model that a memory key comes from."""

    last_ffn_input = "last_ffn_input"  # what the last decoder layer's feed-forward block reads, after its layer norm
    last_ffn_output = "last_ffn_output"  # what that block returns, before the residual sum
    final_hidden = "final_hidden"  # what the output embedding reads

    @staticmethod
    def from_string(name: str) -> KeyType:
        """Read a name. Raises: ValueError with the known names."""
        return lookup({kind.value: kind for kind in KeyType}, name, "knn_keytype")


class Dist(str, Enum):
    """The similarity of a query and a neighbour."""

    l2 = "l2"  # minus the squared distance
    dot = "dot"  # inner product with the full key

    @staticmethod
    def from_string(name: str) -> Dist:
        """Read a name. Raises: ValueError with the known names."""
        return lookup({kind.value: kind for kind in Dist}, name, "knn_sim_func")


KEY_TYPE, DIST = KeyType, Dist


def key_type(given: str | Enum | None) -> KeyType:
    """A key type from its name, an enum member of that name, or None for ``last_ffn_input``."""
    if given is None:
        return KeyType.last_ffn_input
    return KeyType.from_string(given.name if isinstance(given, Enum) else given)


def dist(given: str | Enum | None) -> Dist:
    """A similarity from its name, an enum member of that name, or None for ``l2``."""
    if given is None:
        return Dist.l2
    return Dist.from_string(given.name if isinstance(given, Enum) else given)
