"""Search over the keys of a datastore: exact, or by a faiss index and faster paths through its lists."""

# np: without the reordering of codes that polysemous search needs; nothing here uses it, and it takes most of the
# training time (measured: 15 of 15.1 s for 3000 x 16 keys).
# fsr: 4-bit codes of what a key differs from its list's centroid in, as PQ has it.
# RR: RaBitQ keeps a bit per column, which is most informative when no column outweighs the others: they are mixed
# first.
INDEXES: dict[str, str] = {
    "flat": "Flat",
    "ivfpq": "IVF{ncentroids},PQ{code_size}np",
    "ivfsq8": "IVF{ncentroids},SQ8",
    "ivfpq-fastscan": "IVF{ncentroids},PQ{half_codes}x4fsr",
    "ivfrabitq": "RR{dim},IVF{ncentroids},RaBitQ",
}
"""Kinds of index that ``build_dstore.py --index`` makes, as faiss factory strings. Add your line here."""
