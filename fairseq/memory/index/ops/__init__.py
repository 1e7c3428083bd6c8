"""Kernels and numerics that several searches share: bounds, k-means, rounding, ordering, merging."""
