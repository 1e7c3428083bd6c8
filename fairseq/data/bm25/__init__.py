"""BM25 over segments of a corpus: search, results on disk, and batches that put neighbours together."""
