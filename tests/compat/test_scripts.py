"""What scripts written for fairseq call: helpers, data sets, parsers, checkpoints and the hub interface."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.logging import meters, metrics

from fairseq import checkpoint_utils, hub_utils, options, progress_bar, tasks, utils
from fairseq.data import (
    Dictionary,
    LMContextWindowDataset,
    MonolingualDataset,
    TokenBlockDataset,
    data_utils,
    lm_context_window_dataset,
    monolingual_dataset,
    token_block_dataset,
)
from fairseq.models.transformer_lm import TransformerLanguageModel


def test_helpers():
    sample = {"a": [torch.ones(2, dtype=torch.float16)], "b": (3, "x")}
    assert utils.move_to_cpu(sample)["a"][0].dtype == torch.float32
    assert utils.item(torch.tensor(2.5)) == utils.item(2.5) == 2.5
    assert utils.strip_pad(torch.tensor([4, 1, 5, 1]), 1).tolist() == [4, 5]
    assert utils.fill_with_neg_inf(torch.zeros(1, dtype=torch.float16)).dtype == torch.float32
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(utils.log_softmax(x, 1), x.float().log_softmax(1))
    assert utils.get_activation_fn("gelu")(torch.ones(1)).item() == pytest.approx(0.8413, abs=1e-4)
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        utils.get_activation_fn("relux")
    assert (utils.get_perplexity(3.0), utils.get_perplexity(None)) == (8.0, 0.0)
    tokens = torch.tensor([[4, 5, 1], [6, 7, 8]])
    assert utils.make_positions(tokens, 1).tolist() == [[2, 3, 1], [2, 3, 4]]
    left = utils.convert_padding_direction(tokens, 1, right_to_left=True)
    assert left.tolist() == [[1, 4, 5], [6, 7, 8]]
    assert utils.convert_padding_direction(left, 1, left_to_right=True).equal(tokens)
    assert utils.eval_str_list("[1, 2]", int) == [1, 2]


def test_rows_are_collated_and_batched():
    rows = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
    assert data_utils.collate_tokens(rows, 1).tolist() == [[4, 5, 2], [6, 2, 1]]
    moved = data_utils.collate_tokens(rows, 1, 2, left_pad=True, move_eos_to_beginning=True, pad_to_multiple=4)
    assert moved.tolist() == [[1, 2, 4, 5], [1, 1, 2, 6]]
    sizes = [3, 1, 2]
    batches = data_utils.batch_by_size([1, 2, 0], lambda i: sizes[i], max_tokens=4)
    assert [b.tolist() for b in batches] == [[1, 2], [0]]
    with data_utils.numpy_seed(3):
        first = np.random.rand()
    with data_utils.numpy_seed(3):
        assert np.random.rand() == first


def test_data_sets_in_fairseqs_form_serve_what_ours_do(data_bin: Path):
    dictionary = Dictionary.load(data_bin / "dict.txt")
    text = data_utils.load_indexed_dataset(str(data_bin / "valid"), dictionary)
    assert data_utils.load_indexed_dataset(str(data_bin / "nothing")) is None
    blocks = TokenBlockDataset(text, text.sizes, 16, dictionary.pad(), dictionary.eos(), "none", include_targets=True)
    ours = token_block_dataset.TokenBlockDataset(text.tokens, text.sizes, 16, "none")
    source, target, past = blocks[3]
    assert target.tolist() == ours[3].tolist()
    assert source[1:].equal(target[:-1])
    assert past[1:].equal(source[:-1])
    data = MonolingualDataset(blocks, blocks.sizes, dictionary)
    plain = monolingual_dataset.MonolingualDataset(ours, dictionary.pad(), dictionary.eos())
    numbers = [0, len(data) - 1]
    sample, batch = data.collater([data[i] for i in numbers]), plain.collate(numbers)
    assert sample["net_input"]["src_tokens"].equal(batch.tokens_BT)
    assert sample["target"].equal(batch.target_BT)
    assert sample["ntokens"] == batch.num_scored
    window = LMContextWindowDataset(data, 16, 8, dictionary.pad())
    expected = lm_context_window_dataset.LMContextWindowDataset(plain, range(len(plain)), 8, 24).collate(numbers)
    sample = window.collater([window[i] for i in numbers])
    assert sample["net_input"]["src_tokens"].equal(expected.tokens_BT)
    assert sample["net_input"]["start_indices"] == [0, 8]


def test_meters_weigh_and_aggregations_nest():
    with metrics.aggregate("train") as outer, metrics.aggregate() as inner:
        metrics.log_scalar("loss", 1.0, 3, priority=1, round=2)
        with metrics.aggregate(new_root=True):
            metrics.log_scalar("loss", 100.0)
        metrics.log_scalar("loss", 5.0, 1)
        metrics.log_derived("ppl", lambda found: 2 ** found["loss"].avg, priority=0)
    assert list(inner.get_smoothed_values().items()) == [("ppl", 4.0), ("loss", 2.0)]
    assert metrics.get_smoothed_values("train") == outer.get_smoothed_values()
    metrics.reset_meters("train")
    assert metrics.get_meter("train", "loss").avg is None
    watch = meters.StopwatchMeter()
    watch.start()
    watch.stop()
    assert watch.sum == watch.avg > 0
    metrics.reset()


def test_a_progress_bar_reports(caplog):
    caplog.set_level("INFO")
    bar = progress_bar.progress_bar([1, 2], log_format="simple", log_interval=2, epoch=3)
    for number in bar:
        bar.log({"loss": number})
    assert [record.message for record in caplog.records] == ["epoch 003 | loss 2"]


def test_parsers_give_all_settings_and_take_a_scripts_own(data_bin: Path):
    parser = options.get_training_parser()
    parser.add_argument("--mine", type=int, default=7)
    words = [str(data_bin), "--arch", "transformer_lm_gpt", "--lr", "0.5", "--max-update", "3", "--max-tokens", "64"]
    found = options.parse_args_and_arch(parser, [*words, "--mine", "8"])
    assert (found.mine, found.decoder_embed_dim, found.lr, found.clip_norm) == (8, 768, (0.5,), 25.0)
    assert tasks.setup_task(found).target_dictionary == Dictionary.load(data_bin / "dict.txt")
    scored = options.parse_args_and_arch(options.get_eval_lm_parser(), [str(data_bin), "--path", "x", "--lmbda", "0.5"])
    assert (scored.weight, scored.context_window, scored.gen_subset) == (0.5, 0, "test")
    generated = options.get_generation_parser().parse_args([str(data_bin), "--path", "x", "--beam", "3"])
    assert (generated.beam, generated.sampling) == (3, False)


@pytest.fixture(scope="module")
def hub(trained: Path, data_bin: Path):
    return TransformerLanguageModel.from_pretrained(
        str(trained), "checkpoint_best.pt", str(data_bin), tokenizer="moses"
    )


def test_an_ensemble_is_loaded_with_its_task(trained: Path, data_bin: Path, hub):
    path = str(trained / "checkpoint_best.pt")
    models, settings, task = checkpoint_utils.load_model_ensemble_and_task([path], {"dropout": 0.5})
    assert settings.data == str(data_bin)
    assert task.dictionary == hub.dictionary
    model = models[0].eval()
    words = hub.encode("w1 w3 w9")
    out = model(src_tokens=torch.cat([words[-1:], words[:-1]])[None], src_lengths=torch.tensor([4]))
    logp = model.get_normalized_probs(out, log_probs=True)[0]
    torch.testing.assert_close(logp.gather(1, words[:, None])[:, 0], hub.score("w1 w3 w9")["positional_scores"])
    assert model.state_dict().keys() == hub.models[0].state_dict().keys()
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert state["args"].tokens_per_sample == 32


def test_the_hub_encodes_decodes_and_scores(hub):
    tokens = hub.encode("w1 w3, w9")
    assert tokens.dtype == torch.int64
    assert hub.decode(hub.encode("w1 w3 w9")) == "w1 w3 w9"
    found = hub.score(["w1 w3 w9"])[0]["positional_scores"]
    words = hub.encode("w1 w3 w9")
    inputs = torch.cat([words[-1:], words[:-1]])[None]  # </s> first
    expected = hub.models[0].vocab_logp(hub.models[0](inputs).hidden_BTD[0]).gather(1, words[:, None])[:, 0]
    torch.testing.assert_close(found, expected)


def test_the_hub_searches_and_samples(hub):
    words = hub.encode("w1 w3")[:-1]
    greedy = hub.generate(words, beam=1, max_len_b=5)[0]
    taken = words
    while len(taken) < len(greedy["tokens"]) - 1:
        inputs = torch.cat([torch.tensor([2]), taken])[None]
        logp = hub.models[0].vocab_logp(hub.models[0](inputs).hidden_BTD[:, -1])[0]
        logp[[0, 1]] = -torch.inf
        logp[2] = -torch.inf if len(taken) == 2 and greedy["tokens"][2] != 2 else logp[2]
        taken = torch.cat([taken, logp.argmax()[None]])
    assert greedy["tokens"].tolist() == [*taken.tolist(), 2]
    best = hub.generate(words, beam=4, max_len_b=5)
    assert [h["score"] for h in best] == sorted((h["score"] for h in best), reverse=True)
    assert best[0]["score"] >= greedy["score"] - 1e-5
    torch.manual_seed(0)
    texts = {hub.sample("w1 w3", sampling=True, sampling_topk=5, temperature=0.9, max_len_b=8) for _ in range(6)}
    assert len(texts) > 1
    assert all(text.startswith("w1 w3") for text in texts)


def test_what_is_missing_is_named(trained: Path, data_bin: Path):
    with pytest.raises(ValueError, match="'no-such-model' is no folder"):
        hub_utils.from_pretrained("no-such-model")
    with pytest.raises(ValueError, match="unknown bpe 'gpt3'"):
        hub_utils.from_pretrained(str(trained), "checkpoint_best.pt", str(data_bin), bpe="gpt3")
    with pytest.raises(ValueError, match="needs bpe_codes=FILE"):
        hub_utils.from_pretrained(str(trained), "checkpoint_best.pt", str(data_bin), bpe="fastbpe")
