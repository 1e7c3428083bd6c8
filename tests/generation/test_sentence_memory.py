"""SK-MT's stores of single sentences against one sentence at a time, with pairs found and decoded one by one."""

import numpy as np
import pytest
import torch

from fairseq.data.bm25.similar_pairs import SimilarSources, similarities
from fairseq.data.language_pair_dataset import LanguagePairDataset, Side
from fairseq.generation.sentence_memory import SentenceMemory
from fairseq.memory.combiners.learned import LearnedWeighting
from fairseq.memory.combiners.nearest_distance import NearestDistance
from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from tests.generation.test_sequence_generator import EOS, PAD, SOURCES, VOCAB, generate, make_model, require_equal
from tests.helpers.naive_beam import beam_search


class Texts(list):
    """Sentences in memory."""

    def __init__(self, sentences):
        super().__init__(np.array(sentence) for sentence in sentences)
        self.sizes = np.array([len(sentence) for sentence in self])


def made_pairs(count=14, seed=0):
    draw = np.random.default_rng(seed)
    sources = [[*draw.integers(4, 14, draw.integers(1, 6)).tolist(), EOS] for _ in range(count)]
    targets = [[*draw.integers(4, VOCAB, draw.integers(1, 5)).tolist(), EOS] for _ in range(count)]
    return LanguagePairDataset(Side(Texts(sources), PAD, EOS), Side(Texts(targets), PAD, EOS))


def edit_distance(one, other):
    table = [[max(i, j) for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            change = table[i - 1][j - 1] + (one[i - 1] != other[j - 1])
            table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def naive_nearest(dataset, sentence, count):
    """All pairs with a word in common are candidates, as long as there are few pairs."""
    found = []
    for number in range(len(dataset)):
        source = dataset.source(number).tolist()
        if set(source[:-1]) & set(sentence[:-1]):
            similar = 1 - edit_distance(sentence, source) / max(len(sentence), len(source))
            found.append((-similar, number))
    return [number for _, number in sorted(found)[:count]]


def naive_store(model, dataset, numbers):
    keys, values = [], []
    for number in numbers:
        target = torch.from_numpy(dataset.target(number))
        text = torch.cat([torch.tensor([EOS]), target[:-1]])
        source = torch.from_numpy(dataset.source(number))
        keys.append(model(text[None], "model_output", source_BS=source[None]).key_BTD[0])
        values.append(target)
    return torch.cat(keys), torch.cat(values)


def naive_mix(keys, values, k, temperature):
    def mix(logits, logp, query):
        distance, rows = (keys - query).square().sum(1).topk(min(k, len(keys)), largest=False)
        weight = max(0.0, 1.0 - float(distance[0]) / temperature)
        share = torch.zeros_like(logp[0]).index_add(0, values[rows], (-distance / temperature).softmax(0))
        return ((1 - weight) * logp.exp() + weight * share).log()

    return mix


def memory_of(model, dataset, k, temperature, num_pairs):
    mixer = VocabularyMixer(LearnedWeighting(NearestDistance(k, temperature)))
    similar = SimilarSources(dataset.source_side.sentences)
    return SentenceMemory(model, dataset, similar, mixer, key_tap="model_output", num_pairs=num_pairs, k=k)


@torch.no_grad()
@pytest.mark.parametrize(("k", "num_pairs"), [(1, 2), (2, 16), (5, 3)])
def test_every_sentence_searches_the_store_of_its_own_pairs(k, num_pairs):
    model, dataset = make_model(3), made_pairs()
    found = generate([model], SOURCES, memory_of(model, dataset, k, 90.0, num_pairs))
    plain = generate([model], SOURCES)
    assert any(a[0].score != b[0].score for a, b in zip(found, plain))
    for source, hypotheses in zip(SOURCES, found):
        store = naive_store(model, dataset, naive_nearest(dataset, source, num_pairs))
        require_equal(hypotheses, beam_search(model, source, beam=3, limit=8, mix=naive_mix(*store, k, 90.0)))


def test_a_sentence_without_similar_pairs_is_translated_by_the_model_alone():
    model, dataset = make_model(4).float(), made_pairs()
    strange = [[17, 18, EOS], [19, EOS]]
    memory = memory_of(model, dataset, 2, 90.0, 4)
    for before, after in zip(generate([model], strange), generate([model], strange, memory)):
        assert [h.tokens.tolist() for h in before] == [h.tokens.tolist() for h in after]
        assert all(torch.equal(b.logp, a.logp) for b, a in zip(before, after))
    alone, _ = generate([model], [*strange[:1], SOURCES[0]], memory)  # beside one that has a store
    assert alone[0].tokens.tolist() == generate([model], strange)[0][0].tokens.tolist()


def test_the_nearest_are_those_of_smallest_edit_distance():
    dataset = made_pairs(60, seed=1)
    similar = SimilarSources(dataset.source_side.sentences)
    for number in range(0, 60, 7):
        sentence = dataset.source(number)
        others = [dataset.source(i) for i in range(60)]
        expected = [1 - edit_distance(sentence, o) / max(len(sentence), len(o)) for o in others]
        assert similarities(sentence, others).tolist() == pytest.approx(expected)
        assert similar.nearest(sentence, 9) == naive_nearest(dataset, sentence.tolist(), 9)
    assert similarities(np.array([EOS]), []).tolist() == []
    with pytest.raises(ValueError, match="no pairs of sentences to search"):
        SimilarSources(Texts([]))
