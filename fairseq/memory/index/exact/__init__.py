"""Exact search over the keys of a store, without an index to build."""
