"""k-means of a store's keys, for the lists and codes of indexes and for clusters."""
