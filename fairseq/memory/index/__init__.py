"""Searching a datastore: exactly (``exact.py``) or with a faiss index (``faiss_index.py``, built by ``build.py``)."""

# np: without the reordering of codes that polysemous search needs; nothing here uses it, and it takes most of the
# training time (measured: 15 of 15.1 s for 3000 x 16 keys).
INDEXES: dict[str, str] = {
    "flat": "Flat",
    "ivfpq": "IVF{ncentroids},PQ{code_size}np",
}
"""Kinds of index that ``build_dstore.py --index`` makes, as faiss factory strings. Add your line here."""
