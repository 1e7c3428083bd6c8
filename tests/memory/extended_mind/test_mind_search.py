"""Every search finds what comparing everything finds, and attention in parts is attention over everything."""

import pytest
import torch

from fairseq.memory.extended_mind.attention import (
    LocalRule,
    Partial,
    gathered,
    local_attention,
    memory_attention,
    memory_scores,
    plain_local,
)
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.lookup import LayerLookup, ScoreRule
from fairseq.memory.extended_mind.search import SEARCHES, PlainSearch
from fairseq.memory.extended_mind.settings import MEMORY_TYPES, MindSettings, chosen_layers


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(query, key, k):
    cosine = (
        torch.nn.functional.normalize(query.double(), dim=-1) @ torch.nn.functional.normalize(key.double(), dim=-1).mT
    )
    order = cosine.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return order, cosine.gather(-1, order)


def everything(key_GSD):
    return [SEARCHES[name](key_GSD, MindSettings()) for name in MEMORY_TYPES] + [PlainSearch(key_GSD)]


@pytest.mark.parametrize(
    ("memories", "width", "queries", "k"),
    [
        (1, 8, 1, 1),
        (63, 8, 3, 5),
        (64, 12, 100, 64),
        (700, 64, 9, 10),
        (700, 20, 200, 10),
        (9000, 16, 60, 4),
        (5, 8, 60, 9),
        (700, 20, 9, 300),
        (9000, 16, 60, 70),
    ],
)
def test_the_nearest_are_found(memories, width, queries, k, products):
    # Off the origin and of very different lengths, as keys of a language model are.
    key = (random(2, memories, width) + 2 * random(width, seed=1)) * (1 + random(2, memories, 1, seed=2).abs() * 5)
    query = random(2, queries, width, seed=3) - 0.5
    ids, cosine = nearest(query, key, k)
    for search in everything(key):
        found = search.search(query * 3, k)
        assert found.ids_GNK.dtype is torch.int64
        assert (found.ids_GNK == ids).float().mean() > 0.999  # the rest are equal but for rounding
        torch.testing.assert_close(found.similarity_GNK, cosine.float(), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("queries", "copies"), [(2, 30), (100, 30), (100, 1200)])
def test_of_equal_memories_the_earlier_comes_first(queries, copies, products):
    key = random(1, 10, 8).repeat(1, copies, 1)
    found = SEARCHES["manual"](key, MindSettings()).search(random(1, queries, 8, seed=1), 5)
    best = found.ids_GNK[0, :, :1] % 10
    assert torch.equal(found.ids_GNK[0], best + torch.arange(0, 50, 10))


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_strange_queries_harm_nobody(queries, value):
    query = random(1, queries, 8)
    query[0, 0] = value
    found = SEARCHES["manual"](random(1, 200, 8, seed=1), MindSettings()).search(query, 3)
    assert ((found.ids_GNK >= 0) & (found.ids_GNK < 200)).all()
    ids, _ = nearest(query[:, 1:], random(1, 200, 8, seed=1), 3)
    assert torch.equal(found.ids_GNK[:, 1:], ids)


@pytest.mark.parametrize("queries", [1, 3000])
def test_a_search_belongs_to_no_mode(queries):
    """What torch makes in its inference mode cannot be written to outside."""
    search, query = SEARCHES["manual"](random(2, 300, 8), MindSettings()), random(2, queries, 8, seed=1)
    with torch.inference_mode():
        inside = search.search(query, 3).ids_GNK
    assert torch.equal(search.search(query, 3).ids_GNK, inside)


def dense(query, key, value, see, scale):
    each = query.shape[1] // key.shape[1]
    score = (query.double() @ key.double().repeat_interleave(each, 1).mT * scale).masked_fill(~see, -torch.inf)
    return score.softmax(-1).nan_to_num(0) @ value.double().repeat_interleave(each, 1), torch.logsumexp(score, -1)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("mask", ["none", "boolean", "numbers"])
@pytest.mark.parametrize("attention", [local_attention, plain_local])
def test_local_attention_and_its_normaliser(attention, mask, queries):
    query, key, value = random(2, 4, queries, 8), random(2, 2, 9, 8, seed=1), random(2, 2, 9, 8, seed=2)
    see = random(2, 1, queries, 9, seed=3) > 0
    see[1, 0, 0] = False  # as a padding position
    if mask == "none":
        see = torch.ones_like(see)
    given = {"none": None, "boolean": see, "numbers": torch.zeros(see.shape).masked_fill(~see, torch.finfo().min)}[mask]
    found = attention(query, key, value, LocalRule(given, 0.3))
    out, norm = dense(query, key, value, see, 0.3)
    torch.testing.assert_close(found.out_BHTD, out.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm_BHT, norm.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [local_attention, plain_local])
def test_causal_attention_of_an_empty_static_cache(attention):
    query, key, value = random(2, 4, 5, 8), random(2, 2, 12, 8, seed=1), random(2, 2, 12, 8, seed=2)
    cut = 12 if attention is local_attention else 5
    found = attention(query, key[:, :, :cut], value[:, :, :cut], LocalRule(None, 0.3, causal=True))
    see = torch.ones(5, 12, dtype=torch.bool).tril()
    out, norm = dense(query, key, value, see, 0.3)
    torch.testing.assert_close(found.out_BHTD, out.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm_BHT, norm.float(), atol=1e-5, rtol=1e-5)


def test_attention_in_parts_is_attention_over_all_keys():
    query, key, value = random(2, 4, 3, 8), random(2, 4, 11, 8, seed=1), random(2, 4, 11, 8, seed=2)
    parts = [
        local_attention(query, key[:, :, p], value[:, :, p], LocalRule(None, 0.3)) for p in (slice(4), slice(4, 11))
    ]
    whole = dense(query, key, value, torch.ones(3, 11, dtype=torch.bool), 0.3)[0]
    torch.testing.assert_close(parts[0].joined(parts[1]), whole.float(), atol=1e-5, rtol=1e-5)
    double = Partial(parts[0].out_BHTD.double(), parts[0].norm_BHT).joined(parts[1])
    assert double.dtype is torch.float64
    torch.testing.assert_close(double, whole, atol=1e-5, rtol=1e-5)
    nothing = Partial(torch.zeros_like(query), torch.full((2, 4, 3), -torch.inf))
    torch.testing.assert_close(parts[0].joined(nothing), parts[0].out_BHTD)
    assert torch.equal(nothing.joined(nothing), torch.zeros_like(query))
    norm = nothing.norm_BHT.clone().requires_grad_()
    Partial(nothing.out_BHTD, norm).joined(nothing).sum().backward()
    assert torch.equal(norm.grad, torch.zeros_like(norm))


def memory_of(key, value, **more):
    places = torch.arange(key.shape[1])
    about = {"token_N": places, "place_S": places, "document_starts": (0,), "model_digest": "x", "positions": "origin"}
    return Memory(layers={0: LayerMemory(key, value)}, **about | more)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 700])
def test_a_look_at_memories_is_attention_over_the_nearest(queries, softcap, products):
    query, key, value = random(2, 4, queries, 8), random(2, 50, 8, seed=1), random(2, 50, 6, seed=2)
    settings = MindSettings(topk=7, mask_by_sim=True, sim_threshold=0.4)
    attended = LayerLookup(memory_of(key, value), 0, settings).attend(query, ScoreRule(0.3, softcap), settings)
    own_key, own_value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    cosine = torch.cosine_similarity(query[:, :, :, None], own_key[None, :, None], dim=-1)
    see = (cosine.argsort(-1, descending=True).argsort(-1) < 7) & (cosine > 0.4)
    score = torch.einsum("bhtd,hsd->bhts", query, own_key) * 0.3
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~see, -torch.inf)
    expected = torch.einsum("bhts,hsd->bhtd", score.softmax(-1).nan_to_num(0), own_value)
    torch.testing.assert_close(attended.partial.out_BHTD, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attended.partial.norm_BHT, score.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.isfinite(attended.read().score_BHTK), attended.read().similarity_BHTK > 0.4)


def test_compiled_and_plain_attention_agree_in_halves_too():
    query, key, value = random(1, 4, 5, 8), random(2, 30, 8, seed=1), random(2, 30, 8, seed=2)
    settings, rule = MindSettings(topk=6), ScoreRule(0.3, slope_H=torch.rand(4), before_B=torch.tensor([-5]))
    full = LayerLookup(memory_of(key, value), 0, settings).attend(query, rule, settings)
    half = memory_of(key.bfloat16(), value.bfloat16())
    near = LayerLookup(half, 0, settings).attend(query.bfloat16(), rule, settings)
    torch.testing.assert_close(full.partial.out_BHTD, near.partial.out_BHTD.float(), atol=0.05, rtol=0.05)
    exact = LayerLookup(half.to(dtype=torch.float32), 0, settings).attend(query.bfloat16().float(), rule, settings)
    torch.testing.assert_close(exact.partial.out_BHTD, near.partial.out_BHTD.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.partial.norm_BHT, near.partial.norm_BHT, atol=1e-5, rtol=1e-5)


def test_relative_alibi_costs_a_slope_a_place():
    """Memories of 6 tokens, of which none is farther than 4 before the local text."""
    memory = memory_of(random(1, 6, 4), random(1, 6, 4, seed=1), positions="relative", reach=4)
    assert memory.offsets().tolist() == [-3, -3, -3, -2, -1, 0]
    settings, rule = MindSettings(topk=6), ScoreRule(1.0, slope_H=torch.tensor([0.5]), before_B=torch.tensor([-3]))
    query = random(1, 1, 1, 4, seed=2)
    attended = LayerLookup(memory, 0, settings).attend(query, rule, settings)
    ids = attended.read().ids_BHTK[0, 0, 0]
    dot = (memory.layers[0].key_GSD[0] @ query[0, 0, 0])[ids]
    torch.testing.assert_close(attended.read().score_BHTK[0, 0, 0], dot + 0.5 * (memory.offsets()[ids] - 3))


def test_what_is_gathered_is_each_heads_own():
    layer = LayerMemory(random(2, 5, 3), random(2, 5, 4, seed=1))
    ids = torch.tensor([[[[4, -1]], [[0, 1]], [[2, 3]], [[1, 1]]]])
    key, value = gathered(layer, ids)
    assert torch.equal(key[0, 0, 0, 0], layer.key_GSD[0, 4])
    assert torch.equal(value[0, 2, 0], layer.value_GSD[1, [2, 3]])
    scores = memory_scores(torch.ones(1, 4, 1, 3), key, 1.0, None, None).masked_fill(ids < 0, -torch.inf)
    torch.testing.assert_close(memory_attention(scores, value).out_BHTD[0, 0, 0], layer.value_GSD[0, 4])


def test_settings_are_merged_and_layers_are_numbered_from_both_ends():
    settings = MindSettings.merged(
        {"topk": 3, "remove_special_tokens": False}, {"topk": 4, "use_external_mind_by_layer": [True]}
    )
    assert (settings.topk, settings.remove_special_ids, settings.sim_threshold) == (4, False, 0.25)
    assert settings.use_external_mind_by_layer == (True,)
    assert settings.with_changes(topk=None, mask_by_sim=True).topk == 4
    assert chosen_layers([0, -1], 3) == (True, False, True)
    assert chosen_layers(None, 3) is None
