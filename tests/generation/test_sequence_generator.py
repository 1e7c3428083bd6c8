"""Batched beam search with a cache against one sentence at a time without either."""

import math

import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.data.language_pair_dataset import pad_sentences
from fairseq.generation.beam_search import drawn_continuations
from fairseq.generation.config import GenerationConfig
from fairseq.generation.next_token import NeighborMemory, NextToken
from fairseq.generation.sequence_generator import SequenceGenerator
from fairseq.memory.combiners.vocab_mixing import FixedWeighting, JointWeighting, VocabularyMixer
from fairseq.memory.types import Candidates
from fairseq.models.architectures import build_model_config
from fairseq.models.transformer import TransformerModel
from tests.helpers.naive_beam import EOS, PAD, beam_search
from tests.helpers.small_models import SIZE
from tests.helpers.small_models import make_model as make_lm

SOURCES = [[5, 7, 9, 4, EOS], [8, EOS], [6, 6, 11, EOS], [10, 4, 4, 9, 12, 13, EOS]]
VOCAB, SOURCE_VOCAB = 15, 20


def dictionary(size):
    made = Dictionary()
    for number in range(size - len(made)):
        made.add_symbol(f"w{number}")
    return made


def make_model(seed=0, sharpness=6.0, **given):
    """A model whose distributions are far from even, so that beams differ."""
    torch.manual_seed(seed)
    size = SIZE | {name.replace("decoder", "encoder"): value for name, value in SIZE.items() if "put" not in name}
    size.pop("max_target_positions")
    config = build_model_config("transformer_iwslt_de_en", size | {"max_target_positions": 30, "dropout": 0.0} | given)
    model = TransformerModel.build(config, VOCAB, PAD, source_size=SOURCE_VOCAB).double().eval()
    with torch.no_grad():
        output = model.decoder.output_projection.weight
        output.copy_(torch.randn_like(output) * sharpness / 4)
    return model


def inputs(sources):
    return {"source_BS": pad_sentences([torch.tensor(s).numpy() for s in sources], PAD, left=True)}, [
        len(s) for s in sources
    ]


def generate(models, sources, memory=None, prefix=None, **given):
    config = GenerationConfig(**({"beam": 3, "nbest": given.get("beam", 3), "max_len_b": 8} | given))
    generator = SequenceGenerator(models, dictionary(VOCAB), config, memory)
    return generator.generate(*inputs(sources), prefix)


def require_equal(found, expected):
    assert [h.tokens.tolist() for h in found] == [tokens for tokens, _, _ in expected]
    for hypothesis, (_, score, logps) in zip(found, expected):
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
        assert hypothesis.logp.tolist() == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize(
    "given", [{"beam": 1}, {"beam": 3}, {"beam": 5, "lenpen": 0.4}, {"beam": 4, "lenpen": 2.0, "unkpen": 1.5}]
)
def test_a_batch_is_translated_as_each_sentence_alone(given, normalize_before):
    model = make_model(decoder_normalize_before=normalize_before, encoder_normalize_before=normalize_before)
    options = {name: value for name, value in given.items() if name != "beam"}
    for source, found in zip(SOURCES, generate([model], SOURCES, **given)):
        require_equal(found, beam_search(model, source, beam=given["beam"], limit=8, **options))


@pytest.mark.parametrize("lm", [False, True])
def test_float32_finds_the_texts_of_float64(lm):
    """Where a cache that beams share, packed products and their threads are."""
    model = make_lm().eval() if lm else make_model()
    prefix = torch.tensor([[5, 6], [7, 4], [9, 9], [4, 8]]) if lm else None
    found = []
    for dtype in (torch.float64, torch.float32):
        given = ({}, [2] * 4) if lm else inputs(SOURCES)
        words = dictionary(model.dictionary_size)
        generator = SequenceGenerator([model.to(dtype)], words, GenerationConfig(beam=4, nbest=4, max_len_b=9))
        found.append([h for hypotheses in generator.generate(*given, prefix) for h in hypotheses])
    for own, exact in zip(*found):
        assert own.tokens.tolist() == exact.tokens.tolist()
        assert own.score == pytest.approx(exact.score, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_limits_of_length(seed):
    model = make_model(seed)
    for source, found in zip(SOURCES, generate([model], SOURCES, max_len_a=0.5, max_len_b=2, min_len=3)):
        limit = int(0.5 * len(source) + 2)
        require_equal(found, beam_search(model, source, beam=3, limit=limit, min_len=3))


def test_a_limit_beyond_the_model_is_the_models():
    model = make_model(0)
    longest, expected = generate([model], SOURCES, max_len_a=2e9), generate([model], SOURCES, max_len_b=29)
    assert [h[0].tokens.tolist() for h in longest] == [h[0].tokens.tolist() for h in expected]


def test_scores_that_are_not_finite_are_named():
    model = make_model(0)
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="4 of 4 sentences have no text with a finite score"):
        generate([model], SOURCES)


def test_no_ngram_occurs_twice():
    model = make_model(3)
    plain = generate([model], SOURCES, max_len_b=12)
    found = generate([model], SOURCES, max_len_b=12, no_repeat_ngram_size=2)
    assert [h[0].tokens.tolist() for h in plain] != [h[0].tokens.tolist() for h in found]
    for source, hypotheses in zip(SOURCES, found):
        require_equal(hypotheses, beam_search(model, source, beam=3, limit=12, ngram=2))


def test_texts_begin_as_they_are_told_to():
    model = make_model(1)
    prefix = torch.tensor([[4, 9]] * len(SOURCES))
    for source, found in zip(SOURCES, generate([model], SOURCES, prefix=prefix)):
        require_equal(found, beam_search(model, source, beam=3, limit=8, prefix=(4, 9)))
    with pytest.raises(ValueError, match="begin with 2 tokens, but may have 1; raise --max-len-b"):
        generate([model], SOURCES, prefix=prefix, max_len_b=1)


def test_an_empty_source_has_an_empty_translation():
    model = make_model(2)
    (empty,), other = generate([model], [[EOS], [5, 6, EOS]])
    assert (empty.tokens.tolist(), empty.score) == ([EOS], 0.0)
    require_equal(other, beam_search(model, [5, 6, EOS], beam=3, limit=8))


@pytest.mark.parametrize("share", [False, True])
def test_learned_positions_and_shared_embeddings(share):
    given = {"encoder_learned_pos": True, "decoder_learned_pos": True, "share_decoder_input_output_embed": share}
    model = make_model(4, **given)
    for source, found in zip(SOURCES, generate([model], SOURCES)):
        require_equal(found, beam_search(model, source, beam=3, limit=8))


def test_several_models_are_averaged():
    models = [make_model(seed) for seed in (0, 1)]

    class Mean:
        """Both models as one for the naive search."""

        def __call__(self, text, tap, **given):
            self.outs = [model(text, tap, **given) for model in models]
            return self.outs[0]

        def vocab_scores(self, hidden):
            parts = [m.vocab_scores(o.hidden_BTD[:, -1]).softmax(1) for m, o in zip(models, self.outs)]
            return (sum(parts) / len(parts)).log()

    for source, found in zip(SOURCES, generate(models, SOURCES)):
        require_equal(found, beam_search(Mean(), source, beam=3, limit=8))


def test_a_language_model_continues_text():
    model = make_lm(share_decoder_input_output_embed=True).eval()
    config = GenerationConfig(beam=3, nbest=3, max_len_b=9)
    generator = SequenceGenerator([model], dictionary(30), config)
    prefixes = torch.tensor([[5, 6, 7], [9, 9, 4]])
    for prefix, found in zip(prefixes.tolist(), generator.generate({}, [4, 4], prefixes)):
        require_equal(found, beam_search(model, None, beam=3, limit=9, prefix=prefix))


class Store:
    """A memory of a few keys, searched in float64, that counts its queries."""

    def __init__(self, dim, k, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(40, dim, generator=draw, dtype=torch.double)
        self.values = torch.randint(2, VOCAB, (40,), generator=draw)
        self.k, self.queries = k, []

    def neighbors(self, query):
        self.queries.append(len(query))
        return (query.double() @ self.keys.T).topk(self.k, 1)

    def candidates(self, found, device):
        scores, rows = found
        return Candidates(self.values[rows], scores.float(), torch.ones_like(rows, dtype=torch.bool), rows)


def dense_mix(store, weight, temperature, dim=None, adds_up=True):
    """The mixture by its formula over the whole vocabulary."""

    def mix(logits, logp, query):
        scores, rows = store.neighbors(query)
        scale = temperature * (dim**0.5 if dim else 1.0)
        share = torch.zeros_like(logp).scatter_add(1, store.values[rows], (scores / scale).softmax(1))
        lam = weight
        if dim:
            z_memory = torch.logsumexp(scores / scale, 1)
            lam = (z_memory - torch.logaddexp(torch.logsumexp(logits, 1), z_memory)).exp()[:, None]
        return ((1 - lam) * logp.exp() + (lam if adds_up else 1.0) * share).log()

    return mix


@pytest.mark.parametrize("kind", ["fix", "trime", "trime, the original's sum"])
def test_neighbors_are_mixed_into_every_step(kind):
    model = make_model(5)
    store, naive = Store(16, 6), Store(16, 6)
    adds_up = kind != "trime, the original's sum"
    weighting = FixedWeighting(0.4, 2.0) if kind == "fix" else JointWeighting(16, 2.0, adds_up=adds_up)
    mix = dense_mix(naive, 0.4, 2.0, None if kind == "fix" else 16, adds_up)
    memory = NeighborMemory(store, VocabularyMixer(weighting), "model_output")
    plain = generate([model], SOURCES)
    found = generate([model], SOURCES, memory)
    assert all(abs(before[0].score - after[0].score) > 1e-3 for before, after in zip(plain, found))
    for source, hypotheses in zip(SOURCES, found):
        require_equal(hypotheses, beam_search(model, source, beam=3, limit=8, mix=mix))


def test_beams_share_the_first_search_and_ended_sentences_are_not_searched():
    store = Store(16, 4)
    memory = NeighborMemory(store, VocabularyMixer(0.3, 1.0), "model_output")
    found = generate([make_model(6)], SOURCES, memory, max_len_a=1.0, max_len_b=0)
    assert store.queries[0] == len(SOURCES)
    longest = [max(len(h.tokens) for h in hypotheses) for hypotheses in found]
    assert max(longest) > min(longest), "the sentences end at different steps"
    assert len(store.queries) == max(longest)
    assert min(store.queries[1:]) < 3 * len(SOURCES)


@torch.no_grad()
@pytest.mark.parametrize("weighting", [FixedWeighting(0.4, 3.0), FixedWeighting(1.0), JointWeighting(16, 0.5)])
def test_every_step_is_a_distribution(weighting):
    model = make_model(7)
    memory = NeighborMemory(Store(16, 5), VocabularyMixer(weighting), "model_output")
    steps = NextToken([model], inputs(SOURCES)[0], memory=memory)
    tokens = torch.full((len(SOURCES), 1), EOS)
    for word in (4, 9, 5):
        logp = steps.logp(tokens)
        assert logp.double().exp().sum(1).tolist() == pytest.approx([1.0] * len(SOURCES), abs=1e-6)
        tokens = torch.full((len(SOURCES), 1), word)
    memory = NeighborMemory(Store(16, 5), VocabularyMixer(JointWeighting(16, 0.5, adds_up=False)), "model_output")
    whole = NextToken([model], inputs(SOURCES)[0], memory=memory).logp(torch.full((len(SOURCES), 1), EOS)).exp().sum(1)
    assert (whole > 1.01).all(), "the original's sum is no distribution"


def test_no_weight_and_an_empty_memory_leave_the_bits_of_the_model():
    model = make_model(8).float()
    plain = generate([model], SOURCES)

    class Empty(Store):
        def candidates(self, found, device):
            filled = super().candidates(found, device)
            return Candidates(filled.values_NM, filled.scores_NM, torch.zeros_like(filled.keep_NM), filled.rows_NM)

    for store, weight in ((Store(16, 4), FixedWeighting(0.0)), (Empty(16, 4), FixedWeighting(0.5))):
        found = generate([model], SOURCES, NeighborMemory(store, VocabularyMixer(weight), "model_output"))
        for before, after in zip(plain, found):
            assert [h.tokens.tolist() for h in before] == [h.tokens.tolist() for h in after]
            assert all(torch.equal(b.logp, a.logp) for b, a in zip(before, after))


def test_drawing_from_one_type_is_greedy_search():
    model = make_model(9)
    for given in ({"sampling_topk": 1}, {"sampling_topp": 1e-6}):
        greedy, drawn = generate([model], SOURCES, beam=1), generate([model], SOURCES, beam=3, sampling=True, **given)
        for one, several in zip(greedy, drawn):
            assert {tuple(h.tokens.tolist()) for h in several} == {tuple(one[0].tokens.tolist())}
            assert several[0].score == pytest.approx(one[0].score, abs=1e-6)


def test_scores_that_are_no_numbers_are_named():
    logp_RV = torch.randn(4, 9).log_softmax(1)
    logp_RV[2] = torch.nan
    with pytest.raises(ValueError, match="scores are no numbers"):
        drawn_continuations(logp_RV, torch.zeros(2, 2), -1, -1.0)


@torch.no_grad()
def test_first_tokens_are_drawn_by_their_probability():
    model = make_model(10, sharpness=2.0)
    torch.manual_seed(3)
    source, count = [[5, 7, EOS]], 13
    logp = NextToken([model], inputs(source)[0]).logp(torch.tensor([[EOS]]))[0]
    logp[[PAD, EOS]] = -math.inf
    expected = logp.double().softmax(0)
    seen = torch.zeros(VOCAB)
    for _ in range(50):
        (found,) = generate([model], source, beam=count, sampling=True, max_len_b=3)
        for hypothesis in found:
            seen[hypothesis.tokens[0]] += 1
    total = int(seen.sum())
    assert total == 50 * count
    spread = (expected * (1 - expected) / total).sqrt()
    assert ((seen / total - expected).abs() < 5 * spread + 1e-9).all()


def test_scores_do_not_depend_on_batch_or_beam():
    model = make_model(11).float()
    together = {tuple(h.tokens.tolist()): h.score for h in generate([model], SOURCES, beam=4)[0]}
    alone = {tuple(h.tokens.tolist()): h.score for h in generate([model], SOURCES[:1], beam=5, nbest=5)[0]}
    common = together.keys() & alone.keys()
    assert common
    assert all(together[text] == pytest.approx(alone[text], abs=1e-5) for text in common)


def test_impossible_settings_are_rejected():
    model = make_model(0)
    for given, message in (
        ({"beam": 14}, "--beam 14 is too large for a dictionary of 15 types"),
        ({"beam": 0}, "--beam"),
        ({"nbest": 4, "beam": 3}, "--nbest 4 is more than the 3 hypotheses of --beam"),
        ({"logit_temperature": 0.0}, "--temperature must be at least 1e-06, got 0.0; --beam 1 takes the most probable"),
        ({"prefix_size": 9, "max_len_b": 4}, "--prefix-size 9 begins texts that --max-len-b 4 ends before"),
    ):
        with pytest.raises(ValueError, match=message):
            generate([model], SOURCES, **given)
    memory = NeighborMemory(Store(16, 4), VocabularyMixer(0.3), "model_output")
    with pytest.raises(ValueError, match="a datastore is of one model, --path names 2"):
        generate([model, model], SOURCES, memory)
