"""Exact search against brute force in float64, whatever it passes over the keys by."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import similarities
from conftest import PRODUCTS, set_fast_products
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.memory.index.exact import candidates, streamed
from fairseq.memory.index.exact import index as exact
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.ops import products
from fairseq.memory.index.ops.bounded_scores import RoundedQueries, Rounding
from fairseq.memory.types import Metric

FINE = ["amx_int8_fine", "avx512_vnni_fine", "avx2_fine", "asimddp_fine"]
STREAMED = ("streamed avx2", "streamed library_int8", "streamed float32")
SHAPES = ("even", "clustered", "outlying", "constant", "far")


def rows(shape: str, count: int, dim: int, seed: int) -> np.ndarray:
    """Rows as hidden states may be: alike, with a few large columns, all the same, or far from the origin."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((count, dim))
    if shape == "clustered":
        made = 0.3 * made + 3 * np.random.default_rng(7).standard_normal((5, dim))[rng.integers(0, 5, count)]
    if shape == "outlying":
        made[:, :: max(1, dim // 2)] *= 10
    if shape == "constant":
        made[:] = np.random.default_rng(8).standard_normal(dim)
    if shape == "far":
        made += 50
    return made.astype(np.float32)


def search_by(monkeypatch: Any, name: str, keys: np.ndarray, metric: Metric, query_ND: torch.Tensor, k: int) -> Any:
    """Search with products of that name, in blocks of 64 rows and with groups of a few queries.

    Streamed: what may be near is scored while its block passes by.
    """
    with monkeypatch.context() as patch:
        patch.setattr(exact, "_FEW_QUERIES", 1)
        set_fast_products(patch, name.removeprefix("streamed "))
        patch.setattr(ExactIndex, "has_wide_bounds", lambda *_: name in STREAMED)
        patch.setattr(ExactIndex, "_passing_share", lambda *_: 0.0)
        patch.setattr(exact, "_SAMPLE_ROWS", 30)
        patch.setattr(streamed, "capacity", lambda k: k + 84)
        patch.setattr(exact, "_BLOCK_BYTES", 64 * 4 * keys.shape[1])
        patch.setattr(exact, "_GROUP_SCORES", 64 * 20)
        patch.setattr(exact, "_TILE_BYTES", 100 * 4 * keys.shape[1])
        patch.setattr(candidates, "capacity", lambda k: k + 84)
        return ExactIndex(keys, metric).search(query_ND, k)


@pytest.mark.parametrize("name", [*PRODUCTS, *FINE, *STREAMED])
@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    metric=st.sampled_from(list(Metric)),
    count=st.integers(1, 700),
    dim=st.sampled_from([1, 3, 8, 40, 130]),
    num_queries=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_what_is_found_is_what_brute_force_finds(name, shape, metric, count, dim, num_queries, dtype, data):
    k = data.draw(st.integers(1, count))
    keys = torch.from_numpy(rows(shape, count, dim, 1)).to(dtype)
    queries = rows(shape, num_queries, dim, 2)
    with pytest.MonkeyPatch.context() as patch:
        found = search_by(patch, name, keys, metric, torch.from_numpy(queries), k)
    truth = similarities(metric, queries, keys.float().numpy())
    best = np.sort(truth, axis=1)[:, ::-1][:, :k]
    size = 1.0 if metric is Metric.COS else np.abs(truth).max() + 1
    np.testing.assert_allclose(found.scores_NK, best, rtol=1e-5, atol=2e-6 * size)
    assert [len(set(row)) for row in found.ids_NK.tolist()] == [k] * num_queries
    np.testing.assert_allclose(np.take_along_axis(truth, found.ids_NK.numpy(), 1), best, rtol=1e-5, atol=2e-6 * size)
    assert (found.scores_NK.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", [*PRODUCTS, *FINE, *STREAMED])
def test_of_equal_keys_the_lower_rows_are_found(name, monkeypatch):
    keys = np.repeat(rows("even", 3, 8, 1), 400, axis=0)
    found = search_by(monkeypatch, name, keys, Metric.L2, torch.from_numpy(keys[[0, 500, 900]]), 9)
    assert found.ids_NK.tolist() == [list(range(first, first + 9)) for first in (0, 400, 800)]


@pytest.mark.parametrize("streams", [False, True])
def test_a_sample_that_promises_too_much_is_not_believed(streams, monkeypatch, products):
    """Keys of the sample are near all queries, and more neighbours than these are wanted."""
    keys, query_ND = rows("even", 8192, 16, 1), torch.from_numpy(rows("even", 40, 16, 2))
    keys[::32] *= 0.1
    monkeypatch.setattr(ExactIndex, "sample", torch.from_numpy(keys[::32]))
    monkeypatch.setattr(ExactIndex, "has_wide_bounds", lambda *_: streams)
    searches = []
    plain = exact._Search.run
    monkeypatch.setattr(
        exact._Search, "run", lambda search, *out: searches.append(search._guess) or plain(search, *out)
    )
    found = ExactIndex(keys).search(query_ND * 0.01, 300)
    truth = np.sort(similarities(Metric.L2, query_ND.numpy() * 0.01, keys), axis=1)[:, ::-1][:, :300]
    np.testing.assert_allclose(found.scores_NK, truth, rtol=1e-5, atol=1e-5)
    assert searches == [True, False]


def test_a_sample_does_not_keep_the_step_of_blocks():
    """The first tokens of a text's blocks are alike and far from all others; of equal steps many would meet them."""
    keys = rows("even", 16_384, 16, 1)
    keys[::512] += 100.0
    sample_MD = ExactIndex(keys).sample
    assert len(sample_MD) == 512
    assert torch.equal(sample_MD, ExactIndex(keys).sample)
    assert int((sample_MD.mean(1) > 50).sum()) <= 5  # one is to be expected


def assert_products_are_largest(ids_NK: torch.Tensor, query_ND: torch.Tensor, keys: np.ndarray) -> np.ndarray:
    """Returns: the largest products, (N, K)."""
    true_NM = similarities(Metric.IP, query_ND.double().numpy(), keys.astype(np.float64))
    best_NK = -np.sort(-true_NM, axis=1)[:, : ids_NK.shape[1]]
    np.testing.assert_allclose(np.take_along_axis(true_NM, ids_NK.numpy(), 1), best_NK, rtol=1e-5)
    return best_NK


@pytest.mark.parametrize("name", [*PRODUCTS, *FINE])
@pytest.mark.parametrize("scale", [1e-18, 1e-21, 1e-26])
def test_queries_whose_squares_float32_lacks_find_what_others_do(name, scale, monkeypatch):
    keys, query_ND = rows("even", 4000, 64, 1), torch.from_numpy(rows("even", 40, 64, 2))
    tiny_ND = query_ND * scale
    found = search_by(monkeypatch, name, keys, Metric.IP, tiny_ND, 10)
    assert_products_are_largest(found.ids_NK, tiny_ND, keys)


@pytest.mark.parametrize("name", [*PRODUCTS, *FINE])
def test_queries_of_few_columns_find_large_keys(name, monkeypatch):
    keys, query_ND = 1e12 * rows("even", 2000, 64, 1), torch.zeros(40, 64)
    query_ND[torch.arange(40), torch.arange(40) % 7] = 1.0
    found = search_by(monkeypatch, name, keys, Metric.IP, query_ND, 10)
    best_NK = assert_products_are_largest(found.ids_NK, query_ND, keys)
    np.testing.assert_allclose(found.scores_NK, best_NK, rtol=1e-5)


@pytest.mark.parametrize("name", FINE)
def test_keys_large_where_the_sample_is_zero_are_found(name, monkeypatch):
    """Such columns are scaled up so far that squares pass float32."""
    keys, query_ND = rows("even", 4000, 32, 1), torch.from_numpy(rows("even", 40, 32, 2))
    keys[:, 7] = 0.0
    keys[[5, 1000, 3999], 7] = [1e12, -1e12, 2e12]
    monkeypatch.setattr(ExactIndex, "sample", torch.from_numpy(keys[100:200]))
    found = search_by(monkeypatch, name, keys, Metric.IP, query_ND, 10)
    assert_products_are_largest(found.ids_NK, query_ND, keys)


@pytest.mark.parametrize("name", [*PRODUCTS, *FINE])
def test_few_keys_pass(name, monkeypatch):
    """The filter is one: of 20,000 keys a few times k = 100 are looked at again."""
    keys, query_ND = rows("even", 20_000, 64, 1), torch.from_numpy(rows("even", 40, 64, 2))
    scored = []
    plain = candidates.CandidateGroup.write_best

    def counted(group: Any, *out: torch.Tensor) -> None:
        scored.append(int(np.isfinite(group._true_QC).sum()))
        plain(group, *out)

    monkeypatch.setattr(candidates.CandidateGroup, "write_best", counted)
    search_by(monkeypatch, name, keys, Metric.IP, query_ND, 100)
    assert 100 * len(query_ND) <= sum(scored) < 3 * 100 * len(query_ND)


@pytest.mark.parametrize("metric", list(Metric))
def test_memory_decides_the_bulks_and_nothing_else(metric):
    keys, query_ND = rows("clustered", 3000, 16, 1), torch.from_numpy(rows("clustered", 100, 16, 2))
    whole = ExactIndex(keys, metric).search(query_ND, 20)
    parts = ExactIndex(keys, metric, memory_bytes=1 << 18).search(query_ND, 20)
    assert torch.equal(whole.scores_NK, parts.scores_NK)
    assert torch.equal(whole.ids_NK, parts.ids_NK)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 3, 8, 200])
def test_approximate_scores_are_within_their_margin(metric, shape, width):
    keys, queries = rows(shape, 300, width, 1), rows(shape, 50, width, 2)
    query_ND, keys_MD = torch.from_numpy(queries), torch.from_numpy(keys)
    if metric is Metric.COS:
        query_ND, keys_MD = (torch.nn.functional.normalize(x) for x in (query_ND, keys_MD))
    true = torch.from_numpy(similarities(metric, query_ND.numpy(), keys_MD.numpy()))[10:40]
    half = 0.5 if metric is Metric.L2 else 1.0
    widths = {}
    for name in [*PRODUCTS, *FINE]:
        with pytest.MonkeyPatch.context() as patch:
            set_fast_products(patch, name)
            by = RoundedQueries(query_ND, keys_MD[:100], products.chosen(), by_distance=metric is Metric.L2)
            block = by.block(keys_MD)
            raw = torch.empty(30, block.columns, dtype=by.products.raw_dtype)
            by.raw_scores(block, slice(10, 40), raw)
        step, weight, size, bias, slack = (torch.from_numpy(x[:300]).double() for x in block.about_5M)
        scale, zero, reach, _ = torch.from_numpy(by.about_N4[10:40]).double().T[:, :, None]
        score = ((raw[:, :300].double() + zero) * step + weight) * scale + (bias - slack)
        rounding = 2e-6 * (by._slack_N[10:40, None].double() + true.abs())
        error = (half * true - by._shift_N[10:40, None].double() - score).abs()
        assert (error <= size * reach + slack + rounding).all()
        if name in FINE:
            coarse = widths[name.removesuffix("_fine")]
            assert (size * reach).median() < 0.04 * coarse or shape == "constant" or width < 200
        elif by.products.is_rounded:
            widths[name] = (size * reach).median()
        assert (block.about_5M[3, 300:] == -np.inf).all()


@pytest.mark.parametrize("width", [2048, 2100])
@pytest.mark.parametrize("name", FINE)
def test_sums_of_fine_products_do_not_overflow(name, width, monkeypatch):
    """Even of a width for which they are not chosen, and where all entries are as large as the largest."""
    draw = np.random.default_rng(0)
    keys = draw.choice([-1.0, 1.0], (200, 1)) * (1.0 - 1e-3 * draw.random((200, width)))
    query_ND = torch.from_numpy(draw.choice([-1.0, 1.0], (40, 1)) * np.ones((40, width))).float()
    set_fast_products(monkeypatch, name)
    found = ExactIndex(keys.astype(np.float32), Metric.IP).search(query_ND, 9)
    best = -np.sort(-similarities(Metric.IP, query_ND.numpy(), keys), axis=1)[:, :9]
    np.testing.assert_allclose(found.scores_NK, best, rtol=1e-5)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("count", [3, 40])
def test_queries_that_are_not_finite_find_nothing(metric, count):
    """And leave the others alone."""
    keys_MD = rows("even", 200, 8, seed=1).astype(np.float32)
    query_ND = torch.from_numpy(rows("even", count, 8, seed=2)).float()
    wanted = ExactIndex(keys_MD, metric).search(query_ND, 5)
    broken = query_ND.clone()
    broken[0, 3], broken[2, 0] = torch.nan, torch.inf
    found = ExactIndex(keys_MD, metric).search(broken, 5)
    assert (found.ids_NK[[0, 2]] == -1).all()
    assert torch.isneginf(found.scores_NK[[0, 2]]).all()
    rest = [n for n in range(count) if n not in (0, 2)]
    torch.testing.assert_close(found.ids_NK[rest], wanted.ids_NK[rest])
    torch.testing.assert_close(found.scores_NK[rest], wanted.scores_NK[rest])


def test_keys_that_bounds_cannot_tell_apart_are_multiplied_as_they_are(monkeypatch):
    monkeypatch.setattr(products, "chosen", lambda: products.by_name("plain"))
    monkeypatch.setattr(products, "measured", lambda: {"plain": 8e11, "float32": 1e11})
    draw = np.random.default_rng(0)
    apart = draw.standard_normal((4000, 64), dtype=np.float32)
    centres = 20 * draw.standard_normal((8, 64), dtype=np.float32)
    of_8, of_4 = (centres[draw.integers(0, count, 4000)] for count in (8, 4))
    # The last are each near 1,000 others, all equally far but for little; finely rounded the second can be told apart.
    for keys, name in ((apart, "plain"), (of_8 + apart, "plain_fine"), (of_4 + np.float32(0.2) * apart, "float32")):
        query_ND, index = torch.from_numpy(keys[:200] + 1e-4), ExactIndex(keys)
        assert index.products_for(query_ND, 3).name == name
        few_ND = query_ND[:32]  # for which rounding does not pay, unless it is done once for all that come
        assert ExactIndex(keys).products_for(few_ND, 3).name == name.replace("plain_fine", "float32")
        assert index.products_for(few_ND, 3).name == name
        best = similarities(Metric.L2, query_ND.numpy(), keys).max(1)
        np.testing.assert_allclose(index.search(query_ND, 3).scores_NK[:, 0], best, atol=2e-3)
    monkeypatch.setenv(products.SETTING, "plain")
    assert ExactIndex(keys).products_for(query_ND, 3).name == "plain"


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", ["plain", "plain_fine", "float32", "streamed plain"])
def test_kept_keys_change_nothing(name, metric, monkeypatch):
    """The third bulk is searched by what the second one kept; queries with another mean are searched by others."""
    set_fast_products(monkeypatch, name.removeprefix("streamed "))
    monkeypatch.setattr(ExactIndex, "has_wide_bounds", lambda *_: name in STREAMED)
    keys, deleted = rows("clustered", 6000, 24, 1), np.array([0, 70, 5999])
    index = ExactIndex(keys, metric, deleted=deleted)
    rounded = []
    plain = Rounding.round_keys
    monkeypatch.setattr(Rounding, "round_keys", lambda *given: rounded.append(len(given[1])) or plain(*given))
    for number, (offset, k) in enumerate([(0, 9), (0, 9), (0, 9), (0, 30), (50, 9), (0, 2500), (0, 9)]):
        query_ND = torch.from_numpy(rows("clustered", 40, 24, number) + np.float32(offset))
        rounded.clear()
        found = index.search(query_ND, k)
        if name in ("plain", "plain_fine"):
            assert (sum(rounded) < 6000) == (number in (2, 3, 6)), number
        fresh = ExactIndex(keys, metric, deleted=deleted).search(query_ND, k)
        assert torch.equal(found.ids_NK, fresh.ids_NK)
        assert torch.equal(found.scores_NK, fresh.scores_NK)


def test_an_index_can_be_copied(monkeypatch):
    """And so be sent to another process."""
    set_fast_products(monkeypatch, "plain")
    index, query_ND = ExactIndex(rows("even", 6000, 24, 1)), torch.from_numpy(rows("even", 40, 24, 2))
    fresh = copy.deepcopy(index)
    for _ in range(3):
        wanted = index.search(query_ND, 3)
    for each in (fresh, copy.deepcopy(index)):
        assert each.keeper._kept is None
        assert torch.equal(each.search(query_ND, 3).ids_NK, wanted.ids_NK)


def test_keys_that_would_take_more_memory_are_not_kept(monkeypatch):
    set_fast_products(monkeypatch, "plain")
    keys, query_ND = rows("even", 12_000, 24, 1), torch.from_numpy(rows("even", 40, 24, 2))
    for memory_bytes, kept in ((12_000 * 24 * 4, True), (12_000 * 24 * 4 - 1, False)):
        index = ExactIndex(keys, memory_bytes=memory_bytes)
        for _ in range(3):
            index.search(query_ND, 3)
        assert (index.kept_bytes >= 12_000 * 24) == kept
        assert (index.kept_bytes == 0) == (not kept)


@pytest.mark.parametrize("metric", list(Metric))
def test_deleted_rows_may_hold_anything(metric, products):
    keys = rows("even", 530, 8, 0)
    keys[5], keys[9, 2], keys[300] = np.nan, np.inf, 3e38
    deleted = np.array([5, 9, 300])
    query_ND = torch.from_numpy(rows("even", 40, 8, 1))
    found = ExactIndex(keys, metric, deleted=deleted).search(query_ND, 20)
    keys[deleted] = 1.0
    true = similarities(metric, query_ND.numpy(), keys)
    true[:, deleted] = -np.inf
    assert not np.isin(found.ids_NK, deleted).any()
    np.testing.assert_allclose(found.scores_NK, -np.sort(-true, axis=1)[:, :20], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", list(Metric))
def test_a_query_far_from_all_others_leaves_them_alone(metric, products):
    keys, query_ND = rows("even", 600, 8, 0), torch.from_numpy(rows("even", 60, 8, 1))
    expected = ExactIndex(keys, metric).search(query_ND, 9)
    mixed_ND = query_ND.clone()
    mixed_ND[7] *= 1e22 if metric is not Metric.L2 else 1e7
    found = ExactIndex(keys, metric).search(mixed_ND, 9)
    others = torch.arange(60) != 7
    assert torch.equal(found.ids_NK[others], expected.ids_NK[others])
    assert torch.equal(found.ids_NK[7], ExactIndex(keys, metric).search(mixed_ND[7:8], 9).ids_NK[0])


def test_an_alive_key_that_is_no_number_hides_no_other(products):
    keys, query_ND = rows("even", 600, 8, 0), torch.from_numpy(rows("even", 60, 8, 1))
    keys[11] = np.nan
    found = ExactIndex(keys).search(query_ND, 9)
    best = -np.sort(-np.delete(similarities(Metric.L2, query_ND.numpy(), keys), 11, axis=1), axis=1)[:, :9]
    np.testing.assert_allclose(found.scores_NK, best, rtol=1e-5, atol=1e-4)
