"""faiss indexes: building, opening, searching, on disk and on GPUs."""
