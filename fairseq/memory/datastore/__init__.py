"""Datastores: keys and values on disk, written crash-safely, opened memory-mapped, in shards or whole."""
