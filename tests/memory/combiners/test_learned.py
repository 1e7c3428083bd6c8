"""Learned combiners against dense mixtures in float64, and what training makes of good and bad memories."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from fairseq.memory.combiners.adaptive import MetaK
from fairseq.memory.combiners.config import CombinerTrainingConfig
from fairseq.memory.combiners.kernel_smoothing import KernelSmoothing
from fairseq.memory.combiners.learned import LearnedCombiner, LearnedWeighting, distances, distinct_counts, with_model
from fairseq.memory.combiners.robust import ConfidenceWeights
from fairseq.memory.combiners.training import Examples, held_out_loss, split_by_sentence, train_network
from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from fairseq.memory.types import Candidates, NeighborFacts

V, D = 13, 6
KINDS = {"adaptive": MetaK, "kster": KernelSmoothing, "robust": ConfidenceWeights}
MODEL_FACTS = frozenset({"model_logp_NM", "top_logp_NM"})


def neighbors(count, k, seed=0, gaps=True, dtype=torch.float64):
    """Neighbours near to far with all facts; some rows have fewer, the second none."""
    made = torch.Generator().manual_seed(seed)
    scores = -(30.0 * torch.rand(count, k, generator=made, dtype=torch.float64)).sort(1).values
    values = torch.randint(0, V, (count, k), generator=made)
    found_K = torch.randint(1, k + 1, (count, 1), generator=made) if gaps else torch.full((count, 1), k)
    if gaps:
        found_K[1] = 0
    keep = torch.arange(k) < found_K
    logp = torch.randn(count, V, generator=made, dtype=torch.float64).mul(3.0).log_softmax(1)
    facts = NeighborFacts(
        query_ND=torch.randn(count, D, generator=made, dtype=torch.float64).to(dtype),
        key_NMD=torch.randn(count, k, D, generator=made, dtype=torch.float64).to(dtype),
        stored_logp_NM=-5.0 * torch.rand(count, k, generator=made, dtype=torch.float64).to(dtype),
    )
    scores = scores.masked_fill(~keep, -torch.inf).to(dtype)
    return Candidates(values.masked_fill(~keep, -1), scores, keep, None, facts), logp.to(dtype)


def make(kind, k, dtype=torch.float64, temperature=7.0):
    torch.manual_seed(3)
    network = KINDS[kind](k, temperature, D, 8, 0.0).to(dtype).eval()
    for weight in network.parameters():  # what starts at zero too
        weight.data.add_(0.3 * torch.randn_like(weight))
    return network


def two_layers(layers, x):
    first, last = layers[0], layers[-1]
    inner = first.weight @ x + first.bias
    inner = inner.relu() if isinstance(layers[1], torch.nn.ReLU) else inner.tanh()
    return last.weight @ inner + last.bias


def by_hand(kind, network, found, logp_V, n):
    """The mixture of row ``n`` over the whole vocabulary, one neighbour after the other."""
    k, kept = network.k, int(found.keep_NM[n].sum())
    if not kept:
        return logp_V.exp()
    d = [-float(s) for s in found.scores_NM[n, :kept]]
    tokens = found.values_NM[n, :kept].tolist()
    far = torch.tensor(d + [d[-1]] * (k - kept), dtype=torch.float64)
    counts = torch.tensor([len(set(tokens[: i + 1])) for i in range(k)], dtype=torch.float64)
    features = torch.cat([far, counts])

    def softmax_of(scores, r):
        weights = [math.exp(s - max(scores[:r])) for s in scores[:r]]
        total = sum(weights)
        dense = torch.zeros(V, dtype=torch.float64)
        for weight, token in zip(weights, tokens):
            dense[token] += weight / total
        return dense

    if kind == "adaptive":
        scores = two_layers(network.layers, (features - network.inputs.mean_F) / network.inputs.std_F)
        w = scores.softmax(0)
        parts = [w[0] * logp_V.exp()]
        for i, r in enumerate(network.choices[1:], 1):
            parts.append(w[i] * softmax_of([-x / network.temperature for x in d], r))
        return sum(parts)
    facts = found.facts
    if kind == "kster":
        q, keys = facts.query_ND[n], facts.key_NMD[n, :kept]
        first = network.log_bandwidth
        width = math.exp(float((first.weight @ torch.cat([q, keys.mean(0)]) + first.bias)[0]))
        scores = [-x / width for x in d]
        kernel = torch.tensor(scores, dtype=torch.float64).softmax(0)
        share = torch.sigmoid(two_layers(network.mixing, torch.cat([q, kernel @ keys])))[0]
    else:
        model = [float(logp_V[token]) for token in tokens]
        pad = [0.0] * (k - kept)
        top = logp_V.sort(descending=True).values[:k]
        top = torch.cat([top, top[-1:].expand(k - len(top))])
        of_model = torch.cat([top, torch.tensor(model + pad, dtype=torch.float64)])
        temperature = network.temperature * math.exp(float(two_layers(network.log_temperature, features)[0]))
        believed = [torch.tensor([m, float(s)], dtype=torch.float64) for m, s in zip(model, facts.stored_logp_NM[n])]
        scores = [-x / temperature + float(two_layers(network.confidence, b)[0]) for x, b in zip(d, believed)]
        odds = [two_layers(network.memory_score, features), two_layers(network.model_score, of_model)]
        share = (odds[0].exp() / (odds[0].exp() + odds[1].exp()))[0]
    return (1 - share) * logp_V.exp() + share * softmax_of(scores, kept)


@pytest.mark.parametrize("k", [1, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_mixture(kind, k):
    found, logp = neighbors(9, k)
    network = make(kind, k)
    with torch.no_grad():
        dense = torch.stack([by_hand(kind, network, found, logp[n], n) for n in range(9)])
    torch.testing.assert_close(dense.sum(1), torch.ones(9, dtype=torch.float64))
    combine = LearnedCombiner(network)
    given = with_model(found, logp, network.needs & MODEL_FACTS)
    columns = [combine(logp[:, v], torch.zeros(9), given, torch.full((9,), v)) for v in range(V)]
    torch.testing.assert_close(torch.stack(columns, 1).exp(), dense, atol=1e-9, rtol=1e-9)
    mixed = (logp + 2.5).float()  # scores before a softmax
    VocabularyMixer(LearnedWeighting(make(kind, k))).mix_(mixed, None, found)
    torch.testing.assert_close(mixed.double().exp(), dense, atol=3e-6, rtol=0)
    assert mixed.double().exp().sum(1).tolist() == pytest.approx([1.0] * 9, abs=1e-6)


def test_whole_vocabularies_by_torch_equal_the_compiled_loop(monkeypatch):
    found, logp = neighbors(5, 8, dtype=torch.float32)
    mixer = VocabularyMixer(LearnedWeighting(make("adaptive", 8, torch.float32)))
    compiled, plain = logp.clone(), logp.clone()
    mixer.mix_(compiled, None, found)
    monkeypatch.setattr(VocabularyMixer, "_mix_on_cpu_", VocabularyMixer._mix_anywhere_)
    mixer.mix_(plain, None, found)
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_rows_get_their_own_shares(kind, monkeypatch):
    found, logp = neighbors(7, 4, dtype=torch.float32)
    mixer = VocabularyMixer(LearnedWeighting(make(kind, 4, torch.float32)))
    whole, parts = logp.clone(), logp.clone()
    mixer.mix_(whole, None, found)
    monkeypatch.setattr("fairseq.memory.combiners.vocab_mixing._CHUNK_NUMBERS", 2 * V)
    mixer.mix_(parts, None, found)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_columns_are_masked_ones(kind):
    """A store of three rows, and a network of eight."""
    network = make(kind, 8)
    found, logp = neighbors(6, 8)
    found = with_model(found, logp, network.needs & MODEL_FACTS)
    masked = found.keep_NM & (torch.arange(8) < 3)
    scores = found.scores_NM.masked_fill(~masked, -torch.inf)
    wide = network(Candidates(found.values_NM, scores, masked, None, found.facts))
    facts = {name: getattr(found.facts, name) for name in NeighborFacts.__dataclass_fields__}
    if kind == "robust":  # the model's largest probabilities do not depend on how many neighbours there are
        facts["top_logp_NM"] = torch.cat([facts["top_logp_NM"][:, :3], torch.zeros(6, 5)], 1)
        wide = network(Candidates(found.values_NM, scores, masked, None, NeighborFacts(**facts)))
    cut = {n: x if x is None or n == "query_ND" else x[:, :3] for n, x in facts.items()}
    narrow = network(Candidates(found.values_NM[:, :3], scores[:, :3], masked[:, :3], None, NeighborFacts(**cut)))
    torch.testing.assert_close(narrow.log_share_NM, wide.log_share_NM[:, :3])
    torch.testing.assert_close(narrow.log_model_N, wide.log_model_N)
    assert narrow.log_model_N[1] == 0.0, "without neighbours there is the model alone"


def test_features():
    scores = torch.tensor([[-1.0, -2.0, -3.0, -torch.inf], [-torch.inf] * 4])
    keep = torch.tensor([[True, True, True, False], [False] * 4])
    found = Candidates(torch.tensor([[5, 5, 7, -1], [-1] * 4]), scores, keep)
    assert distances(found).tolist() == [[1.0, 2.0, 3.0, 3.0], [0.0] * 4]
    assert distinct_counts(found).tolist() == [[1.0, 1.0, 2.0, 2.0], [0.0] * 4]


def test_choices_are_the_powers_of_two_up_to_k():
    assert [MetaK(k, 1.0).choices for k in (1, 6, 8)] == [(0, 1), (0, 1, 2, 4), (0, 1, 2, 4, 8)]
    with pytest.raises(ValueError, match="--k 0: a learned combiner reads at least 1 neighbour"):
        MetaK(0, 1.0)
    with pytest.raises(ValueError, match="temperature 0.0 is not positive"):
        MetaK(4, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    network = make(kind, 6)
    found, logp = neighbors(4, 6)
    found = with_model(found, logp, network.needs & MODEL_FACTS)
    names, weights = zip(*network.named_parameters())
    is_share = torch.isfinite(network(found).log_share_NM)
    assert not is_share[1].any(), "a row without neighbours is among them"

    def shares(*values):
        out = torch.func.functional_call(network, dict(zip(names, values)), (found,))
        return out.log_share_NM[is_share], out.log_model_N

    assert torch.autograd.gradcheck(shares, tuple(w.detach().clone().requires_grad_() for w in weights))


def task(kind, good, dtype=torch.float32, sentences=60, length=20):
    """Tokens that the model gives 0.2 each, and neighbours that all hold the target, or never do."""
    count = sentences * length
    found, logp = neighbors(count, 4, seed=5, gaps=False, dtype=dtype)
    target = torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(6))
    values = target[:, None].expand(-1, 4).clone() if good else (target[:, None] + 1 + torch.arange(4)) % V
    likely = one_hot(target, V) * 0.2 + (1 - one_hot(target, V)) * 0.8 / (V - 1)
    found = Candidates(values, found.scores_NM, found.keep_NM, None, found.facts)
    found = with_model(found, likely.log().to(dtype), KINDS[kind].needs & MODEL_FACTS)
    return Examples(found, torch.full((count,), math.log(0.2)), target, torch.arange(count) // length)


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_trusts_a_good_memory_and_ignores_a_bad_one(kind, good):
    torch.manual_seed(0)
    network = KINDS[kind](4, 7.0, D)
    examples = task(kind, good)
    config = CombinerTrainingConfig(kind=kind, rate=0.01, max_epoch=25)
    before = torch.get_rng_state()
    report = train_network(network, examples, config, seed=1)
    assert torch.equal(before, torch.get_rng_state()), "training leaves the generator of others alone"
    share = network(examples.found).log_model_N.exp().mean()
    assert share < 0.1 if good else share > 0.95
    assert report.model_alone == pytest.approx(-math.log(0.2), abs=1e-5)
    assert report.best < report.before
    assert report.best < 0.1 if good else report.best == pytest.approx(report.model_alone, abs=0.05)
    is_hit = examples.found.same_token(examples.target_N)
    _, held_N = split_by_sentence(examples.block_N, config.held_out, torch.Generator().manual_seed(1))
    assert held_out_loss(network, examples, is_hit, held_N) == pytest.approx(report.best), "the best weights are kept"


def test_sentences_are_held_out_whole():
    block_N = torch.arange(50) // 5
    train_N, held_N = split_by_sentence(block_N, 0.2, torch.Generator().manual_seed(0))
    assert sorted([*train_N.tolist(), *held_N.tolist()]) == list(range(50))
    assert not set(block_N[train_N].tolist()) & set(block_N[held_N].tolist())
    assert len(held_N) == 10
    with pytest.raises(ValueError, match="a split of 1 sentences is too small to hold --held-out 0.2 of them out"):
        split_by_sentence(torch.zeros(9, dtype=torch.int64), 0.2, torch.Generator())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout": 1.0}, r"--combiner-dropout 1.0 is not in \[0, 1\)"),
        ({"rate": 0.0}, "--lr 0.0 is not above 0 and at most 100"),
        ({"held_out": 1.0}, "--held-out 1.0 is not between 0 and 1"),
        ({"patience": 0}, "--patience must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        CombinerTrainingConfig(**given)
