"""Searching a datastore: exactly (``exact.py``) or with a faiss index (``faiss_index.py``, built by ``build.py``)."""

INDEXES: dict[str, str] = {
    "flat": "Flat",
    "ivfpq": "IVF{ncentroids},PQ{code_size}",
}
"""Kinds of index that ``build_dstore.py --index`` makes, as faiss factory strings. Add your line here."""
