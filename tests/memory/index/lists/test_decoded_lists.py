"""Keys that are decoded for searches in bulk are those that faiss reconstructs."""

import faiss
import numpy as np
import pytest

from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops.products import chosen_tiles


@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.parametrize("kind", ["IVF6,PQ4", "IVF6,PQ8", "IVF6,SQ8", "IVF6,Flat"])
def test_decoded_keys_are_those_that_faiss_reconstructs(kind: str, by_residual: bool) -> None:
    key_RD = np.random.default_rng(0).standard_normal((900, 16), dtype=np.float32)
    index = faiss.index_factory(16, kind)
    if not kind.endswith("Flat"):
        index.by_residual = by_residual
    if "PQ" in kind:
        index.do_polysemous_training = False
    index.train(key_RD)
    index.add(key_RD)
    index.make_direct_map()
    expected_RD = index.reconstruct_n(0, len(key_RD))
    lists = DecodedLists(index, products=chosen_tiles())
    for number in range(index.nlist):
        row_M = lists.ids(number)
        at_M = np.arange(len(row_M))[::-1].copy()[: len(row_M) // 2]
        key_MD = np.full((len(at_M), 16), np.nan, np.float32)
        lists._write_keys(number, at_M, key_MD)
        np.testing.assert_allclose(key_MD, expected_RD[row_M[at_M]], rtol=0, atol=2e-6)
