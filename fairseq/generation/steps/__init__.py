"""Decoding steps on a CPU: products with packed matrices, and a cache of keys that beams share."""
