"""Training for translation with memory, from text of two languages to a model that resumed, as a user does it."""

import json

import numpy as np
import pytest

from fairseq.data.segments import read_segments
from fairseq.data.trime_batching import read_order

MODEL = (
    "--task translation --arch transformer_iwslt_de_en --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 "
    "--decoder-embed-dim 16 --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --share-decoder-input-output-embed --decoder-normalize-before --optimizer adam --lr "
    "0.005 --lr-scheduler inverse_sqrt --warmup-updates 4 --clip-norm 0.0 --dropout 0.1 --criterion trime_mt_loss "
    "--label-smoothing 0.0 --dist-func ip --temp 10.0 --topk-mem 8 --max-tokens 200 --cpu --no-progress-bar "
    "--log-interval 1 --num-workers 0"
).split()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, command):
    """A data folder of made-up German and English; every English word ends in a piece of its own."""
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("train", 120), ("valid", 20)):
        sentences = [random.integers(0, 25, random.integers(3, 9)).tolist() for _ in range(count)]
        for lang, word in (("de", "d{}"), ("en", "e{}@@ s")):
            lines = [" ".join(word.format(i) for i in sentence) + " ." for sentence in sentences]
            (folder / f"{split}.{lang}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = f"--source-lang de --target-lang en --trainpref {folder}/train --validpref {folder}/valid"
    command("preprocess.py", *words.split(), "--destdir", folder / "data-bin")
    return folder


@pytest.fixture(scope="module")
def order(pairs, command):
    """Sentence pairs in an order in which similar targets are next to each other."""
    samples = pairs / "segments" / "samples.json"
    done = command("train.py", pairs / "data-bin", "--max-tokens", 200, *MODEL[:4], "--output-samples-to-file", samples)
    assert "wrote 120 sentences" in done.stdout
    folders = ("--index_path", pairs / "index", "--results_path", pairs / "results")
    command("bm25_search.py", *folders, "--segments_path", samples)
    command("bm25_make_batches.py", *folders[2:], "--batch_file", pairs / "batches.json")
    return pairs / "batches.json"


@pytest.mark.slow
def test_samples_are_the_targets_as_text_in_corpus_order(pairs, order, command):
    lines = (pairs / "train.en").read_text().splitlines()
    items = json.loads((pairs / "segments" / "samples.json").read_text())
    assert [item["id"] for item in items] == list(range(120))
    assert [item["contents"] for item in items] == [line.replace("@@ ", "") for line in lines]
    assert sorted(read_order(order, 120, "sentence")) == list(range(120))
    words = "--eval-bleu-detok moses --eval-bleu-remove-bpe --output-samples-to-file"
    command("train.py", pairs / "data-bin", *MODEL, *words.split(), pairs / "moses.json")
    assert list(read_segments(pairs / "moses.json")) == [line.replace("@@ ", "").replace(" .", ".") for line in lines]


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(pairs, order, command, tmp_path):
    import torch

    words = (pairs / "data-bin", *MODEL, "--ce-warmup-epoch", 1, "--predefined-batches", order)
    command("train.py", *words, "--save-dir", tmp_path / "whole", "--max-epoch", 2)
    command("train.py", *words, "--save-dir", tmp_path / "parts", "--max-epoch", 1)
    done = command("train.py", *words, "--save-dir", tmp_path / "parts", "--max-epoch", 2)
    assert "norm_loss=" in done.stderr
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--label-smoothing 0.1", "--label-smoothing must be 0 with --criterion trime_mt_loss, got 0.1"),
        ("--ignore-prefix-size 1", "--ignore-prefix-size is not offered"),
        ("--ce-warmup-ratio 0.5", "--ce-warmup-ratio is not offered"),
        ("--output-segments-to-file x.json", "give --output-samples-to-file"),
    ],
)
def test_what_is_not_offered_is_rejected_with_the_way_out(pairs, command, words, said):
    assert said in command("train.py", pairs / "data-bin", *MODEL, *words.split(), expect=2).stderr


@pytest.mark.slow
def test_an_order_of_other_sentences_is_rejected(pairs, command, tmp_path):
    path = tmp_path / "two.json"
    path.write_text("[1, 0]")
    words = (*MODEL, "--save-dir", tmp_path / "run", "--max-epoch", 1, "--predefined-batches", path)
    done = command("train.py", pairs / "data-bin", *words, expect=2)
    assert "holds 2 sentences, the training data has 120; it belongs to other text" in done.stderr


@pytest.mark.slow
def test_samples_of_a_language_model_are_segments(data_bin, command, tmp_path):
    done = command("train.py", data_bin, "--max-tokens", 9, "--output-samples-to-file", tmp_path / "x.json", expect=2)
    assert "--task language_modeling has none; give --task translation, or --output-segments-to-file" in done.stderr
