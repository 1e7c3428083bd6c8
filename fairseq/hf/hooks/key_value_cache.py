"""The key-value cache among the arguments or results of a forward call, whatever transformers calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairseq.hf.hooks.protocols import KeyValueCache, ModelOutput

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Of transformers from 5.24 on, of earlier releases, and of earlier releases' state-space models."""


def cache_of(named: Mapping[str, Any] | ModelOutput) -> KeyValueCache | None:
    """The cache among arguments or results; None without one."""
    for name in CACHE_NAMES:
        cache: KeyValueCache | None = named.get(name)
        if cache is not None and not isinstance(cache, (tuple, list)):
            return cache
    return None


def num_cached(cache: KeyValueCache | None) -> int | None:
    """Tokens in a cache; None where there is none, or one that does not count them (state-space models)."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:  # of a cache without any attention layer
        return None
