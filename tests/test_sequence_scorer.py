"""The scorer against one row at a time, and against loops over the model's own states."""

import math

import numpy as np
import pytest
import torch

from fairseq.data.monolingual_dataset import pad_rows
from fairseq.memory.sources.local import LocalMemory
from fairseq.memory.sources.rolling import RollingMemory
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.sequence_scorer import SequenceScorer, TextMemory

SIZE, PAD, WIDTH, TAP = 40, 1, 16, "last_ffn_input"
SMALL = {"decoder_embed_dim": WIDTH, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 2}
VARIANTS = {"plain": {}, "adaptive": {"adaptive_softmax_cutoff": (10, 20), "adaptive_softmax_factor": 2}}
NUMBERS, LENGTHS, CONTEXT = [4, 5, 6, 9, 10, 11], [5, 1, 7, 3, 3, 6], 4  # 7 and 8 were left out


def make(variant="adaptive", seed=0, **more):
    torch.manual_seed(seed)
    return TransformerLanguageModel.build(TransformerLMConfig(**SMALL, **VARIANTS[variant], **more), SIZE, PAD).eval()


def text_rows():
    """(number, context, source, target) of blocks that follow each other, as the data sets make them."""
    tokens = np.random.default_rng(0).integers(4, 14, sum(LENGTHS) + 1)  # few types: memories hold many targets
    rows, start = [], 0
    for number, length in zip(NUMBERS, LENGTHS):
        source, target = tokens[start : start + length], tokens[start + 1 : start + length + 1]
        rows.append((number, tokens[max(0, start - CONTEXT) : start], source, target))
        start += length
    return rows


def batches(rows_per_batch):
    rows = text_rows()
    parts = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]
    return [pad_rows(np.array([row[0] for row in part]), [row[1:] for row in part], PAD) for part in parts]


def text_memory(kinds):
    sources = {"local": LocalMemory, "long": lambda: RollingMemory(9), "once": lambda: RollingMemory(9, dedup=True)}
    return TextMemory([sources[kind]() for kind in kinds], 1.25)


def score(rows_per_batch, kinds=(), variant="adaptive", **more):
    memory = text_memory(kinds) if kinds else None
    scorer = SequenceScorer([make(variant)], key_tap=TAP, text_memory=memory, **more)
    return [scorer.score(batch) for batch in batches(rows_per_batch)]


def joined(scored, name):
    parts = [getattr(part.text_sums, name) if name in ("hit_N", "whole_N") else getattr(part, name) for part in scored]
    return torch.cat(parts)


@pytest.mark.parametrize("kinds", [("local",), ("long",), ("local", "long"), ("local", "once")])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows_per_batch", [2, 4, 6])
def test_a_batch_is_its_rows_one_at_a_time(rows_per_batch, variant, kinds):
    """Rows of a batch are padded to its longest; alone they are not: padding is never a memory."""
    together, alone = score(rows_per_batch, kinds, variant), score(1, kinds, variant)
    assert all(not (batch.tokens_BT == PAD).any() for batch in batches(1))
    assert any((batch.tokens_BT == PAD).any() for batch in batches(rows_per_batch))
    for name in ("block_N", "target_N"):
        assert torch.equal(joined(together, name), joined(alone, name))
    for name in ("logp_N", "norm_N", "key_ND", "hit_N", "whole_N"):
        torch.testing.assert_close(joined(together, name), joined(alone, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows_per_batch", [1, 6])
def test_what_the_memories_add_is_what_loops_over_the_text_find(rows_per_batch):
    scored, model = score(rows_per_batch, ("local", "long")), make()
    expected, long, last = [], [], None
    for number, context, source, target in text_rows():
        long = long if last in (None, number - 1) else []
        read = torch.from_numpy(np.concatenate([context, source]))
        keys = model(read[None], key_tap=TAP).key_BTD[0].detach().double()
        following = [*read[1:].tolist(), int(target[-1])]
        own = list(zip(keys, following))
        for n in range(len(context), len(read)):
            shares = [(math.exp(keys[n] @ k / math.sqrt(WIDTH) / 1.25), token) for k, token in [*long, *own[:n]]]
            hit, whole = sum(s for s, token in shares if token == following[n]), sum(s for s, _ in shares)
            expected.append([math.log(x) if x else -math.inf for x in (hit, whole)])
        long, last = (long + own[len(context) :])[-9:], number
    ours = torch.stack([joined(scored, "hit_N"), joined(scored, "whole_N")], 1)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-4, atol=1e-4)


class Recorder:
    """A memory that holds nothing and notes what it is shown."""

    def __init__(self):
        self.calls = []

    def lookup(self, passage):
        self.calls.append(("lookup", passage))
        return LocalMemory().lookup(passage)

    def append(self, passage):
        self.calls.append(("append", passage))


def test_passages_are_the_blocks_without_their_padding():
    recorder, other = Recorder(), Recorder()
    scorer = SequenceScorer([make()], key_tap=TAP, text_memory=TextMemory([recorder, other], 1.0))
    (batch,) = batches(6)
    scorer.score(batch)
    assert [kind for kind, _ in recorder.calls] == ["lookup", "append"] * 6
    for (_, passage), (number, context, source, target) in zip(recorder.calls[::2], text_rows(), strict=True):
        assert passage.number == number
        assert passage.num_context == len(context)
        assert passage.value_T.tolist() == [*context, *source, target[-1]][1:]
        assert passage.targets.tolist() == target.tolist()
        alone = make()(torch.from_numpy(np.concatenate([context, source]))[None], key_tap=TAP).key_BTD[0]
        torch.testing.assert_close(passage.key_TD, alone)
        assert len(passage.queries) == len(source)
    assert [passage.number for _, passage in other.calls[::2]] == NUMBERS


def test_a_row_without_a_scored_position_adds_nothing():
    (number, context, source, target), *_ = text_rows()
    nothing = (context[:0], source[:0], target[:0])
    batch = pad_rows(np.array([3, number, 5]), [nothing, (context, source, target), nothing], PAD)
    scorer = SequenceScorer([make()], key_tap=TAP, text_memory=text_memory(["local", "long"]))
    scored = scorer.score(batch)
    assert scored.block_N.tolist() == [number] * len(source)
    assert len(scored.text_sums.hit_N) == len(scored.text_sums.whole_N) == len(source)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("softmax_batch", [None, 1, 3, 100])
def test_scores_are_entries_of_the_models_distribution(variant, softmax_batch):
    model, (batch,) = make(variant), batches(6)
    (scored,) = score(6, variant=variant, softmax_batch=softmax_batch)
    out = model(batch.tokens_BT, key_tap=TAP)
    hidden_ND, target_N = out.hidden_BTD[batch.scored_BT], batch.target_BT[batch.scored_BT]
    assert torch.equal(scored.target_N, target_N)
    wanted = model.vocab_logp(hidden_ND).gather(1, target_N[:, None]).squeeze(1)
    torch.testing.assert_close(scored.logp_N, wanted.detach())
    torch.testing.assert_close(scored.key_ND, out.key_BTD[batch.scored_BT].detach())
    assert scored.block_N.tolist() == [n for n, length in zip(NUMBERS, LENGTHS) for _ in range(length)]
    assert scored.text_sums is None


def test_keys_alone_are_the_keys_of_scoring():
    scorer, (batch,) = SequenceScorer([make()], key_tap=TAP), batches(6)
    keys, scored = scorer.keys(batch), scorer.score(batch)
    assert torch.equal(keys.key_ND, scored.key_ND)
    assert torch.equal(keys.target_N, scored.target_N)
    assert torch.equal(keys.block_N, scored.block_N)
    assert len(keys.logp_N) == 0


def test_several_models_give_their_mean_probability():
    models, (batch,) = [make(seed=0), make(seed=1), make(seed=2)], batches(6)
    together = SequenceScorer(models).score(batch).logp_N
    alone = torch.stack([SequenceScorer([model]).score(batch).logp_N for model in models])
    torch.testing.assert_close(together.exp(), alone.exp().mean(0))
    with pytest.raises(ValueError, match="keys come from one model, --path names 3"):
        SequenceScorer(models, key_tap=TAP)


def test_a_correction_is_made_for_each_model():
    seen = []

    def correct(model, hidden_ND, target_N, logp_N):
        seen.append((model, hidden_ND.shape, target_N.tolist()))
        return logp_N - len(seen)

    models, (batch,) = [make(seed=0), make(seed=1)], batches(6)
    ours = SequenceScorer(models, correct=correct).score(batch)
    alone = [SequenceScorer([model]).score(batch).logp_N.exp() for model in models]
    torch.testing.assert_close(ours.logp_N.exp(), (alone[0] / math.e + alone[1] / math.e**2) / 2)
    assert [model for model, *_ in seen] == models
    assert seen[0][1:] == ((sum(LENGTHS), WIDTH), ours.target_N.tolist())
