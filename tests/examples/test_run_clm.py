"""examples/huggingface/run_clm.py with a tiny GPT-2: every step a user takes, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from example_commands import names_read, readme_commands

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fairseq.memory.datastore.datastore import Datastore  # noqa: E402

Clm = Callable[..., str]


def perplexity(told: str) -> float:
    found = re.search(r"^Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)$", told, re.MULTILINE)
    assert found, told
    assert 2 ** float(found[1]) == pytest.approx(float(found[2]), rel=1e-3)
    return float(found[2])


def saved_share(told: str) -> float:
    found = re.search(r"^saved ([0-9.]+)% of the searches$", told, re.MULTILINE)
    assert found, told
    return float(found[1])


def scored_by_hand(folder: Path, lines: list[str], group: int, size: int, stride: int) -> tuple[list[int], list[float]]:
    """Each token in the first window that has it, one window at a time, without any code of the project."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    targets, logp = [], []
    for first in range(0, len(lines), group):
        ids = [i for line in lines[first : first + group] for i in tokenizer(line)["input_ids"]]
        for first in range(0, len(ids), stride):
            start = max(0, first + stride - size)
            window = torch.tensor(ids[start : first + stride])
            with torch.no_grad():
                scores = model(window[None]).logits[0].log_softmax(-1)
            for place in range(max(1, first - start), len(window)):
                targets.append(int(window[place]))
                logp.append(float(scores[place - 1, window[place]]))
    return targets, logp


def test_each_token_is_scored_once_and_group_tails_are_kept(
    clm: Clm, corpus: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    text = corpus / "valid.txt"
    lines = text.read_text().splitlines(keepends=True)
    words = ("--validation_file", text, "--do_eval", "--lines_per_group", 25, "--per_device_eval_batch_size", 3)
    told = clm(*words, "--block_size", 24, "--stride", 7, "--save_scores", tmp_path / "scores.npz")
    targets, logp = scored_by_hand(tiny_gpt2, lines, 25, 24, 7)
    stored = np.load(tmp_path / "scores.npz")
    assert stored["target"].tolist() == targets
    np.testing.assert_allclose(stored["logprob"], logp, atol=2e-5)
    assert perplexity(told) == pytest.approx(math.exp(-np.mean(logp)), rel=1e-3)
    kept = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert kept["num_tokens"] == len(targets) == sum(len(line.split()) + 1 for line in lines) - 3
    manifest = json.loads((tmp_path / "out" / "eval.run.json").read_text())
    assert manifest["figures"] == kept
    assert manifest["inputs"][str(text)]["bytes"] == text.stat().st_size
    assert kept["eval_loss"] == pytest.approx(-np.mean(logp), rel=1e-5)
    assert perplexity(clm(*words)) != perplexity(told)  # windows of 32 and half of that
    proved = clm(*words, "--block_size", 24, "--stride", 7, "--prove", 5)
    assert perplexity(proved) == perplexity(told)
    assert "proof of mass: ok" in proved
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["proof"]["num_positions"] == 5
    with pytest.raises(ValueError, match="--prove 0 is neither"):
        clm(*words, "--prove", 0)


def test_without_tails_a_group_is_cut_to_whole_windows(clm: Clm, corpus: Path, tmp_path: Path) -> None:
    lines = (corpus / "valid.txt").read_text().splitlines(keepends=True)
    num_tokens = sum(len(line.split()) + 1 for line in lines)
    clm(
        "--validation_file",
        corpus / "valid.txt",
        "--do_eval",
        "--drop_group_tails",
        "--save_scores",
        tmp_path / "a.npz",
    )
    clm("--validation_file", corpus / "valid.txt", "--do_eval", "--save_scores", tmp_path / "b.npz")
    cut, whole = (np.load(tmp_path / name)["logprob"] for name in ("a.npz", "b.npz"))
    assert len(whole) == num_tokens - 1
    assert len(cut) == num_tokens // 32 * 32 - 1
    np.testing.assert_allclose(cut, whole[: len(cut)], atol=2e-5)


def test_a_datastore_is_saved_indexed_clustered_and_used(clm: Clm, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    texts = ("--train_file", corpus / "train.txt", "--validation_file", corpus / "valid.txt", "--dstore_dir", store)
    told = clm(*texts, "--do_eval", "--eval_subset", "train", "--save_knnlm_dstore")
    lines = (corpus / "train.txt").read_text().splitlines()
    num_tokens = sum(len(line.split()) + 1 for line in lines)
    rows = num_tokens - math.ceil(num_tokens / 32)  # the first token of each window has no key
    assert f"saved {rows} keys" in told
    opened = Datastore.open(store / "dstore_gpt2_16")
    assert (len(opened), opened.dim, opened.metadata["key_tap"]) == (rows, 16, "last_ffn_input")
    plain = perplexity(clm(*texts, "--do_eval"))
    words = ("--do_eval", "--lmbda", "0.5", "--k", "32")
    exact = perplexity(clm(*texts, *words, "--knn"))
    assert exact < 0.8 * plain
    told = clm(*texts, "--build_index", "--ncentroids", "8", "--code-size", "8")
    assert f"over {rows} keys" in told
    found = perplexity(clm(*texts, *words, "--knn", "--probe", "8", "--recompute_dists"))
    assert found == pytest.approx(exact, rel=0.05)
    assert perplexity(clm(*texts, *words, "--knn", "--no-load-keys")) < 0.9 * plain
    assert perplexity(clm(*texts, *words, "--knn", "--lmbda", "0")) == plain
    searched = clm(*texts, *words, "--retomaton", "--min-knns", "9999999", "--probe", "8", "--recompute_dists")
    assert perplexity(searched) == pytest.approx(found, rel=0.05)  # rows that pointers lead to come on top
    assert saved_share(searched) == 0.0
    words = (*words, "--retomaton", "--probe", "8")
    pointers = clm(*texts, *words)
    assert 5.0 < saved_share(pointers) < 95.0
    assert perplexity(pointers) < 0.9 * plain
    told = clm(*texts, "--cluster_dstore", "--num_clusters", "20", "--sample-size", "1000")
    assert f"made 20 clusters of {rows} keys" in told
    clustered = clm(*texts, *words)
    assert saved_share(clustered) > saved_share(pointers)
    assert saved_share(clm(*texts, *words, "--min-knns", "900")) < saved_share(clustered)
    assert saved_share(clm(*texts, *words, "--no_pointer")) == 0.0
    assert perplexity(clm(*texts, *words, "--retomaton_compat")) < plain
    kept = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0.0 < kept["saved_share"] < 1.0


def test_the_commands_of_knn_transformers_run_as_they_are_printed(
    examples: Path, corpus: Path, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run_clm

    monkeypatch.chdir(tmp_path)
    model = "neulab/gpt2-finetuned-wikitext103"
    shutil.copytree(tiny_gpt2, tmp_path / model)
    texts = tmp_path / "wikitext" / "wikitext-103-raw-v1"
    texts.mkdir(parents=True)
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        shutil.copy(corpus / f"{ours}.txt", texts / f"{theirs}.txt")
    shared = f"--model_name_or_path {model} --dataset_name wikitext --dataset_config_name wikitext-103-raw-v1"
    figures = {}
    for name, words in {
        "base": "--do_eval --eval_subset validation",
        "save": f"--do_eval --eval_subset train --dstore_dir checkpoints/{model} --save_knnlm_dstore",
        "index": f"--dstore_dir checkpoints/{model} --build_index",
        "clusters": f"--dstore_dir checkpoints/{model}/ --cluster_dstore --num_clusters 30 --sample_size 20000000",
        "knn": f"--do_eval --eval_subset validation --dstore_dir checkpoints/{model} --knn",
        "retomaton": f"--do_eval --eval_subset validation --dstore_dir checkpoints/{model} --retomaton",
    }.items():
        run_clm.main(f"{shared} --output_dir checkpoints/{model} {words}".split())
        if "validation" in words:
            figures[name] = json.loads((tmp_path / "checkpoints" / model / "eval_results.json").read_text())
    assert figures["knn"]["perplexity"] < figures["base"]["perplexity"]
    assert figures["retomaton"]["perplexity"] < figures["base"]["perplexity"]
    assert figures["retomaton"]["saved_share"] > 0.5


def test_two_steps_of_training_change_the_model_and_are_kept(clm: Clm, corpus: Path, tmp_path: Path) -> None:
    texts = ("--train_file", corpus / "train.txt", "--validation_file", corpus / "valid.txt")
    plain = perplexity(clm(*texts, "--do_eval"))
    words = ("--do_train", "--do_eval", "--learning_rate", "0.05", "--lr_scheduler_type", "constant")
    told = clm(*texts, *words, "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1")
    trained = perplexity(told)
    assert trained < 0.9 * plain
    again = perplexity(clm(*texts, "--do_eval", "--model_name_or_path", tmp_path / "out"))
    assert again == pytest.approx(trained, rel=1e-4)
    told = clm(*texts, *words, "--max_steps", "3", "--logging_steps", "1")  # goes on: one step is left
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert perplexity(told) != trained
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "perplexity"} <= results.keys()


def test_a_fresh_model_learns_from_its_config(clm: Clm, corpus: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    told = clm(
        *("--config_name", tiny_gpt2, "--tokenizer_name", tiny_gpt2, "--train_file", corpus / "train.txt"),
        *("--do_train", "--do_eval", "--max_steps", "1", "--eval_strategy", "steps"),
        *("--output_dir", tmp_path / "fresh"),
    )
    assert "eval_loss" in told
    fresh = json.loads((tmp_path / "fresh" / "eval_results.json").read_text())
    held_out = (corpus / "train.txt").read_text().splitlines()[:15]
    assert fresh["num_total_tokens"] == sum(len(line.split()) + 1 for line in held_out)
    assert 50 < fresh["perplexity"] < 1000  # 72 tokens, hardly anything learned
    assert (tmp_path / "fresh" / "model.safetensors").exists()


def test_padding_is_nothing_to_learn(examples: Path) -> None:
    from clm_training import Blocks, Padding

    blocks = Blocks([torch.arange(10, dtype=torch.int32), torch.arange(3, dtype=torch.int32)], 4, None, tails=True)
    assert [len(piece) for piece in blocks.pieces] == [4, 4, 2, 3]
    batch = Padding(7)([blocks[0], blocks[2]])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [8, 9, 7, 7]]
    assert batch["labels"].tolist() == [[0, 1, 2, 3], [8, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert len(Blocks([torch.arange(10)], 4, None, tails=False)) == 2
    with pytest.raises(ValueError, match="shorter than a window"):
        Blocks([torch.arange(3)], 4, None, tails=False)


def test_every_layout_of_a_text_gives_the_same_lines(examples: Path, tmp_path: Path) -> None:
    from clm_arguments import DataArguments
    from clm_data import read_lines, train_lines

    lines = ["a b\n", 'c, "d"\n', "\n", "e\n"]
    (tmp_path / "own" / "raw").mkdir(parents=True)
    (tmp_path / "own" / "raw" / "wiki.valid.tokens").write_text("".join(lines))
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": line}) + "\n" for line in lines))
    quoted = ("".join(['"', line.replace('"', '""'), '"\n']) for line in lines)
    (tmp_path / "a.csv").write_text("sentence\n" + "".join(quoted))
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert list(read_lines(DataArguments(test_file=str(tmp_path / name)), "test")) == lines, name
    folder = DataArguments(dataset_name=str(tmp_path / "own"), dataset_config_name="raw")
    assert list(read_lines(folder, "validation")) == lines
    without = DataArguments(test_file=str(tmp_path / "a.txt"), keep_linebreaks=False)
    assert list(read_lines(without, "test")) == [line.rstrip("\n") for line in lines]
    held_out = DataArguments(train_file=str(tmp_path / "a.txt"), validation_split_percentage=50)
    assert list(read_lines(held_out, "validation")) + list(train_lines(held_out)) == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--do_eval", "--validation_file", "missing.txt"], "--validation_file: no such file: missing.txt"),
        (["--do_eval"], "no text: give --train_file"),
        (["--validation_file", "TEXT"], "nothing to do: give --do_train"),
        (["--do_eval", "--validation_file", "TEXT", "--eval_subset", "vaild"], "unknown --eval_subset 'vaild'"),
        (["--do_eval", "--validation_file", "TEXT", "--eval_subset", "train"], "the subset train needs --train_file"),
        (
            ["--do_eval", "--validation_file", "TEXT", "--block_size", "33"],
            "--block_size 33 is more than the",
        ),
        (["--do_eval", "--validation_file", "TEXT", "--stride", "33"], "--stride 33 is more than the window's 32"),
        (["--do_eval", "--validation_file", "TEXT", "--knn"], "--knn needs --dstore_dir"),
        (["--do_eval", "--validation_file", "TEXT", "--knn", "--dstore_dir", "none"], "no datastore at 'none'"),
        (["--validation_file", "TEXT", "--build_index", "--dstore_dir", "."], "holds no datastore of a gpt2 model"),
        (["--do_eval", "--validation_file", "TEXT", "--lmbda", "1.5"], "--lmbda 1.5 is not in"),
        (["--do_eval", "--validation_file", "TEXT", "--k", "0"], "--k must be at least 1, got 0"),
        (["--do_eval", "--validation_file", "TEXT", "--knm"], "unknown flag --knm (did you mean '--knn'?)"),
        (["--do_eval", "--validation_file", "TEXT", "--min-kns", "1"], "(did you mean '--min_knns'?)"),
        (["--do_eval", "--validation_file", "TEXT", "--knn", "--retomaton"], "exclude each other"),
        (["--do_eval", "--dataset_name", "wikitext"], "wikitext is no local folder"),
        (["--do_eval", "--dataset_name", "."], "should have one text file of the subset 'validation'"),
        (
            ["--do_eval", "--validation_file", "TEXT", "--model_name_or_path", "./none"],
            "./none is no folder of",
        ),
        (["--do_eval", "--validation_file", "EMPTY"], "fewer than two tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_told_before_any_work(
    words: list[str], message: str, clm: Clm, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "empty.txt").write_text("\n")
    replaced = {"TEXT": corpus / "valid.txt", "EMPTY": "empty.txt"}
    with pytest.raises(ValueError, match=re.escape(message)):
        clm(*[replaced.get(word, word) for word in words])
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_causal_model(clm: Clm, corpus: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    transformers.T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    words = ("--model_name_or_path", tmp_path, "--tokenizer_name", tiny_gpt2, "--validation_file", corpus / "valid.txt")
    with pytest.raises(ValueError, match=r"is no causal language model: Unrecognized configuration class [^\n]*$"):
        clm(*words, "--do_eval")


def test_an_encoder_is_refused_before_a_text_is_read(clm: Clm, corpus: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tiny_gpt2))
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(tmp_path)
    words = ("--model_name_or_path", tmp_path, "--tokenizer_name", tiny_gpt2, "--validation_file", corpus / "valid.txt")
    with pytest.raises(ValueError, match=r"\(BertLMHeadModel\) reads the tokens that it is to predict"):
        clm(*words, "--do_eval")


def test_a_store_of_another_size_or_width_is_refused(clm: Clm, corpus: Path, tmp_path: Path) -> None:
    texts = ("--validation_file", corpus / "valid.txt", "--dstore_dir", tmp_path)
    clm(*texts, "--save_knnlm_dstore", "--max_eval_samples", "10")
    for flag, number, message in (
        ("--dstore_size", 12, "has 310 rows"),
        ("--dimension", 99, "holds no datastore of a gpt2 model of width 99"),
        ("--knn_keytype", "final_hidden", "holds keys of last_ffn_input"),
        ("--knn_keytype", "hidden", "unknown knn_keytype 'hidden'"),
    ):
        with pytest.raises(ValueError, match=message):
            clm(*texts, "--do_eval", "--knn", "--k", 8, flag, number)
    assert "Perplexity" in clm(*texts, "--do_eval", "--knn", "--dstore_size", 310, "--dimension", 16, "--k", 8)


def test_old_flags_are_renamed_or_ignored_with_a_warning(
    clm: Clm, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        told = clm(
            *("--do-eval", "--validation-file", corpus / "valid.txt", "--overwrite_output_dir", "--no_cuda"),
            *("--preprocessing_num_workers", "4", "--torch_dtype", "float32", "--max-eval-samples=2", "--knnlm-gpu"),
        )
    assert "Evaluated 31 tokens" in told
    warned = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert [line.split()[0] for line in warned] == ["--overwrite_output_dir", "--preprocessing_num_workers"]


def test_half_precision_moves_the_figure_a_little(clm: Clm, corpus: Path) -> None:
    words = ("--do_eval", "--validation_file", corpus / "valid.txt")
    plain = perplexity(clm(*words))
    for flag in ("--bf16", "--bf16_full_eval"):
        assert perplexity(clm(*words, flag)) == pytest.approx(plain, rel=0.05)


def test_every_argument_is_read(examples: Path) -> None:
    import clm_arguments

    read = names_read(examples, ("cache_dir", "trust_remote_code"))
    kinds = (clm_arguments.ModelArguments, clm_arguments.DataArguments, clm_arguments.KnnArguments)
    assert {field.name for kind in kinds for field in dataclasses.fields(kind)} - read == set()


def test_the_commands_of_the_readme_are_understood(examples: Path) -> None:
    from clm_arguments import parse

    words = readme_commands(examples, "run_clm.py", "models/smollm2")
    assert len(words) == 6
    for each in words:
        chosen, data, _, training = parse(each)
        assert (chosen.model_name_or_path, data.dataset_name) == ("models/smollm2", "wikitext")
        assert training.output_dir


def test_as_a_command_a_mistake_is_one_line_and_status_2(command: Command, tiny_gpt2: Path, corpus: Path) -> None:
    words = ["--model_name_or_path", tiny_gpt2, "--do_eval", "--validation_file", corpus / "valid.txt"]
    told = command("examples/huggingface/run_clm.py", *words, "--stride", "half", expect=2)
    assert told.stderr.splitlines() == ["run_clm.py: error: argument --stride: invalid int value: 'half'"]
