"""examples/pipeline with tiny models: the four stages, kills in each, one and two processes, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import dies_at_event

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("rouge_score")

from forked_commands import Forks  # noqa: E402
from pipeline_mistakes import MISTAKES, write_mistakes  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_pipeline import (  # noqa: E402
    FOLDER,
    configured,
    files_of,
    log_of,
    require_same_training,
    resumed_words,
    without_seconds,
    words_for,
    words_of,
    write_material,
)

from fairseq.config.trees import leaves  # noqa: E402
from fairseq.hf.pipeline import evaluation, saving, training  # noqa: E402
from fairseq.hf.pipeline.config import PipelineConfig  # noqa: E402
from fairseq.hf.pipeline.fabric import check_devices, layers_of  # noqa: E402
from fairseq.memory.datastore.datastore import Datastore  # noqa: E402
from fairseq.runtime.files import locked  # noqa: E402

STAGES = ("generate", "train", "store", "eval")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster without threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs and models without dropout."""
    folder = tmp_path_factory.mktemp("pairs")
    write_material(folder)
    return folder


@pytest.fixture(scope="module")
def stages() -> dict[str, Callable[[PipelineConfig], Any]]:
    """The work of each program, to be run in this process."""
    sys.path.insert(0, str(FOLDER))
    try:
        import generate
    finally:
        sys.path.remove(str(FOLDER))
    return {
        "generate": generate.generate,
        "train": training.train,
        "store": saving.save_store,
        "eval": evaluation.evaluate_pairs,
    }


@pytest.fixture(scope="module")
def finished(
    material: Path, stages: dict[str, Callable[..., Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders of whole runs, one per kind of model."""
    found = {}
    for model in ("t5", "gpt2"):
        found[model] = tmp_path_factory.mktemp(model)
        config = configured(words_for(material, found[model], model))
        for name in STAGES:
            assert not stages[name](config).was_complete
    return found


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "examples.jsonl").read_text().splitlines()]


def scored_by_hand(material: Path, folder: Path, model: str) -> list[tuple[list[float], np.ndarray, list[int]]]:
    """Each validation pair alone: log-probabilities of its output's tokens, their keys and the tokens."""
    path = folder / "model" / "step-00000020"
    has_encoder = model == "t5"
    kind = transformers.AutoModelForSeq2SeqLM if has_encoder else transformers.AutoModelForCausalLM
    net, tokenizer = kind.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)
    block = net.decoder.block[-1].layer[-1].DenseReluDense if has_encoder else net.transformer.h[-1].mlp
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    found = []
    for line in (material / "val.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, out = tokenizer(row["input"])["input_ids"], tokenizer(row["output"])["input_ids"]
        out = out if has_encoder else [*out, tokenizer.eos_token_id]
        with torch.no_grad():
            if has_encoder:
                logits = net(input_ids=torch.tensor([ids]), labels=torch.tensor([out])).logits[0]
                keys = seen.pop()
            else:
                logits = net(input_ids=torch.tensor([ids + out])).logits[0, len(ids) - 1 : -1]
                keys = seen.pop()[len(ids) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(out)[:, None])[:, 0]
        found.append((logp.tolist(), keys.numpy(), out))
    return found


@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_perplexity_with_and_without_neighbours_is_that_of_brute_force(
    model: str, finished: dict[str, Path], material: Path
) -> None:
    config = configured(words_for(material, finished[model], model))
    store = Datastore.open(saving.store_prefix(config))
    rows, values = np.asarray(store.keys).astype(np.float64), np.asarray(store.values)
    outputs = [json.loads(line)["output"] for line in (material / "train.jsonl").read_text().splitlines()]
    assert len(store) == sum(len(text.split()) + 1 for text in outputs)
    entries, total = entries_of(finished[model]), 0.0
    by_hand = scored_by_hand(material, finished[model], model)
    for entry, (logp, keys, tokens) in zip(entries, by_hand, strict=True):
        mixed = []
        for lm, key, token in zip(logp, keys.astype(np.float64), tokens, strict=True):
            distance = ((rows - key) ** 2).sum(1)
            near = np.argsort(distance, kind="stable")[: config.knn.k]
            weight = np.exp(-(distance[near] - distance[near].min()) / config.knn.temperature)
            share = weight[values[near] == token].sum() / weight.sum()
            mixed.append(math.log((1 - config.knn.lmbda) * math.exp(lm) + config.knn.lmbda * share))
        assert entry["model_logp"] == pytest.approx(sum(logp), abs=1e-4)
        assert entry["knn_logp"] == pytest.approx(sum(mixed), abs=1e-3)
        total += sum(mixed)
    results = json.loads((finished[model] / "evaluation" / "results.json").read_text())["figures"]
    assert results["knn"]["perplexity"] == pytest.approx(math.exp(-total / sum(map(len, (x for x, _, _ in by_hand)))))
    right = sum(entry["model_text"] == entry["output"] for entry in entries)
    assert results["model"]["exact_match"] == pytest.approx(100 * right / len(entries))


@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_texts_are_those_of_greedy_search_alone(model: str, finished: dict[str, Path]) -> None:
    path = finished[model] / "model" / "step-00000020"
    kind = transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
    net, tokenizer = kind.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)
    for entry in entries_of(finished[model])[:6]:
        ids = tokenizer(entry["input"], return_tensors="pt")["input_ids"]
        told = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0)
        written = told[0] if model == "t5" else told[0, ids.shape[1] :]
        assert entry["model_text"] == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_a_second_run_changes_nothing(
    finished: dict[str, Path], material: Path, stages: dict[str, Callable[..., Any]]
) -> None:
    before = files_of(finished["t5"])
    config = configured(words_for(material, finished["t5"]))
    for name in STAGES:
        assert stages[name](config).was_complete
    assert files_of(finished["t5"]) == before
    kept = sorted(path.name for path in (finished["t5"] / "model").glob("step-*"))
    assert kept == ["step-00000012", "step-00000018", "step-00000020"], "of 6, 12, 18 and 20, the last three"


KILLS = {"generate": (0, 3), "train": (0, 2), "store": (1, 6), "eval": (0, 1)}
"""Renamings and removals of files before a kill."""
PARTS = {"generate": "dataset", "train": "model", "store": "store", "eval": "evaluation"}


@pytest.mark.parametrize(("stage", "event"), [(stage, event) for stage, events in KILLS.items() for event in events])
def test_a_killed_stage_resumes_to_the_same_files(
    stage: str,
    event: int,
    finished: dict[str, Path],
    material: Path,
    stages: dict[str, Callable[..., Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = PARTS[stage]
    shutil.copytree(finished["t5"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / part)
    config = configured(words_for(material, tmp_path))
    with dies_at_event(monkeypatch, event):
        stages[stage](config)
    assert not stages[stage](config).was_complete
    found, expected = (without_seconds(files_of(folder / part)) for folder in (tmp_path, finished["t5"]))
    assert found == expected


LEFT: dict[str, Callable[[Path], None]] = {
    "a checkpoint that was to be removed": lambda folder: _copy(folder / "model", "step-00000012", "step-00000006"),
    "a checkpoint half removed": lambda folder: _copy(folder / "model", "step-00000012", "step-00000006.tmp"),
    "the lines of all pairs": lambda folder: evaluation._write_lines(
        folder / "evaluation" / "unfinished-1-of-2.jsonl",
        [evaluation._head(json.loads((folder / "evaluation" / "results.json").read_text())["signature"]), "{}\n"],
    ),
}
"""What a kill at the very end of a stage leaves."""


def _copy(folder: Path, one: str, other: str) -> None:
    shutil.copytree(folder / one, folder / other)


@pytest.mark.parametrize("left", LEFT)
def test_what_a_kill_at_the_end_leaves_is_removed(
    left: str, finished: dict[str, Path], material: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished["t5"], tmp_path, dirs_exist_ok=True)
    before = files_of(tmp_path)
    LEFT[left](tmp_path)
    assert files_of(tmp_path) != before
    # The number of checkpoints is that of the run, so that another config removes none of them.
    config = configured([*words_for(material, tmp_path), "training.max_num_checkpoints=1"])
    for stage in (training.train, evaluation.evaluate_pairs):
        done = stage(config)
        assert done is not None
        assert done.was_complete
    assert files_of(tmp_path) == before


def test_a_second_process_does_not_append_to_the_lines_of_the_first(
    finished: dict[str, Path], material: Path, tmp_path: Path
) -> None:
    config = configured([*words_for(material, finished["t5"]), f"evaluation.out_dir={tmp_path}"])
    with (
        locked(tmp_path / "unfinished-0-of-1.lock", "them"),
        pytest.raises(OSError, match=r"another process is writing .*unfinished-0-of-1\.jsonl"),
    ):
        evaluation.evaluate_pairs(config)


def test_evaluation_keeps_the_blocks_of_a_killed_run(
    material: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_BATCHES_PER_BLOCK", 1)
    words = [*words_for(material, finished["t5"]), "evaluation.metrics=[]", f"evaluation.out_dir={tmp_path}"]
    config, original, blocks = configured(words), evaluation._block_lines, []

    def dying(*values: Any) -> Any:
        blocks.append(values[-1])
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return original(*values)

    monkeypatch.setattr(evaluation, "_block_lines", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_pairs(config)
    with (tmp_path / "unfinished-0-of-1.jsonl").open("a") as file:
        file.write('{"number": 8, "in')  # half a line
    evaluation.evaluate_pairs(config)
    assert blocks == [range(0, 4), range(4, 8), range(8, 12), range(8, 12), range(12, 15)]
    assert [line["number"] for line in map(json.loads, (tmp_path / "examples.jsonl").open())] == list(range(15))


@pytest.fixture(scope="module")
def loaded(forks: Forks) -> Forks:
    """Forks that have imported what the programs do."""
    stages = [f"fairseq.hf.pipeline.{name}" for name in ("training", "saving", "evaluation")]
    forks.load("datasets", "transformers.models.t5.modeling_t5", "lightning.fabric.strategies", *stages)
    return forks


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.fixture
def two_ranks(loaded: Forks, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a program as torchrun starts its two processes."""

    def run(program: str, *words: str) -> None:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "one"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = []
        for rank in ("0", "1"):
            with monkeypatch.context() as patch:
                for variable, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items():
                    patch.setenv(variable, value)
                started.append(loaded.start(f"examples/pipeline/{program}.py", *words))
        for process in started:
            assert process.wait() == 0, process.err[-3000:]

    return run


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_spread_weights_are_trained_as_whole_ones_and_resumed_by_any_strategy(
    model: str, strategy: str, finished: dict[str, Path], material: Path, two_ranks: Callable[..., None], tmp_path: Path
) -> None:
    if strategy != "fsdp":
        pytest.importorskip("deepspeed")
    base, spread = finished[model], [*words_for(material, tmp_path, model), *words_of(strategy)]
    two_ranks("train", *spread, f"data.dataset_dir={base}/dataset")
    require_same_training(base, tmp_path)
    training.train(configured(resumed_words(base, tmp_path, tmp_path / "whole", *words_for(material, tmp_path, model))))
    require_same_training(base, tmp_path / "whole")
    if model == "t5" or strategy != "fsdp":
        two_ranks("train", *resumed_words(base, base, tmp_path / "spread", *spread))
        require_same_training(base, tmp_path / "spread")


def test_layers_that_share_a_weight_are_no_units(material: Path) -> None:
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(material / "t5")
    assert layers_of(net) == [*net.encoder.block, *net.decoder.block]
    net.decoder.block[1].layer[0].SelfAttention.q.weight = net.decoder.block[0].layer[0].SelfAttention.q.weight
    assert layers_of(net) == list(net.encoder.block)


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_mixed_precision_keeps_weights_in_float32(
    strategy: str, finished: dict[str, Path], material: Path, two_ranks: Callable[..., None], tmp_path: Path
) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    base = finished["t5"]
    words = [*words_for(material, tmp_path), *words_of(strategy), "fabric.precision=bf16-mixed"]
    words.append(f"data.dataset_dir={base}/dataset")
    for resumes in (False, True):
        now = resumed_words(base, tmp_path, tmp_path / "again", *words) if resumes else words
        if strategy == "auto":
            training.train(configured(now))
        elif strategy != "fsdp" or not resumes:  # it is resumed as in float32
            two_ranks("train", *now)
    for found, exact in zip(log_of(tmp_path), log_of(base)):
        assert found == pytest.approx(exact, abs=0.02 if found["step"] == 1 else 0.3)
    assert log_of(tmp_path)[0]["loss"] != pytest.approx(log_of(base)[0]["loss"], abs=1e-6), "computed in bfloat16"
    weights = load_file(tmp_path / "model" / "step-00000020" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value != value.bfloat16()).any() for value in weights.values())
    if strategy != "fsdp":
        require_same_training(tmp_path, tmp_path / "again", exact=True)


def test_two_processes_train_and_save_what_one_does(
    finished: dict[str, Path], material: Path, two_ranks: Callable[..., None], tmp_path: Path
) -> None:
    words = [*words_for(material, tmp_path), f"data.dataset_dir={finished['t5']}/dataset"]
    two_ranks("train", *words)
    require_same_training(finished["t5"], tmp_path)
    for name in ("store", "eval"):
        two_ranks(name, *words, f"model.checkpoint={finished['t5']}/model")
    one, two = (Datastore.open(at / "store" / "store") for at in (finished["t5"], tmp_path))
    assert len(two.shards) == 2
    np.testing.assert_array_equal(np.asarray(one.keys), np.asarray(two.keys))
    np.testing.assert_array_equal(np.asarray(one.values), np.asarray(two.values))
    every = np.arange(len(one))
    for mine, theirs in zip(one.documents.where(every), two.documents.where(every)):
        np.testing.assert_array_equal(mine, theirs)
    figures = [
        json.loads((at / "evaluation" / "results.json").read_text())["figures"] for at in (finished["t5"], tmp_path)
    ]
    assert figures[0] == figures[1]


def test_gradient_accumulation_counts_tokens(material: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    words = [*words_for(material, tmp_path), f"data.dataset_dir={finished['t5']}/dataset"]
    one = configured([*words, "data.train_batch_size=12", "training.gradient_accumulation_steps=1"])
    done = training.train(one)
    assert done is not None
    assert done.step == 20
    require_same_training(finished["t5"], tmp_path)


def test_retomaton_evaluates_with_clusters(material: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    base = finished["t5"]
    more = [f"data.dataset_dir={base}/dataset", f"model.checkpoint={base}/model", "knn.enable_retomaton=true"]
    config = configured([*words_for(material, tmp_path), *more, "fabric.precision=bf16-mixed", "evaluation.metrics=[]"])
    saved = saving.save_store(config)
    assert saved is not None
    assert saved.clusters == tmp_path / "store" / "store.clusters.npz"
    done = evaluation.evaluate_pairs(config)
    assert done is not None
    assert 0 < done.figures["knn"]["saved_share"] < 1
    assert done.figures["knn"]["perplexity"] < done.figures["model"]["perplexity"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_before_the_long_part(
    mistake: str,
    finished: dict[str, Path],
    material: Path,
    stages: dict[str, Callable[..., Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, overrides, parts = MISTAKES[mistake]
    write_mistakes(tmp_path)
    shutil.copytree(finished["t5"] / "store", tmp_path / "bare", ignore=shutil.ignore_patterns("store.index*"))
    named = [word.format(base=finished["t5"], here=tmp_path, material=material) for word in overrides]
    before = files_of(finished["t5"])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the long part began")

    for module in (training, saving, evaluation):
        monkeypatch.setattr(module, "launch", never)
    if mistake == "no DeepSpeed":
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        stages[stage](configured([*words_for(material, finished["t5"]), *named]))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert files_of(finished["t5"]) == before


def test_more_devices_than_gpus_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="fabric.devices is 2 and this machine has 1 GPUs; give fewer, or fabric.acc"):
        check_devices(configured(["fabric.devices=2"]))
    check_devices(configured(["fabric.devices=2", "fabric.accelerator=cpu"]))


@pytest.mark.parametrize(
    ("damage", "file", "part"),
    [
        ("model", "step-00000018/training.ckpt", "is damaged, or of another model"),
        ("model", "step-00000018/model.safetensors", "has damaged weights"),
        ("model", "log.jsonl", "line 1 of "),
        ("dataset", "validation/data-00000.arrow", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(
    damage: str, file: str, part: str, finished: dict[str, Path], material: Path, tmp_path: Path
) -> None:
    for name in ("model", "dataset"):
        shutil.copytree(finished["t5"] / name, tmp_path / name)
    shutil.rmtree(tmp_path / "model" / "step-00000020")
    path = tmp_path / damage / file
    path.write_bytes(path.read_bytes()[:700] if path.suffix != ".jsonl" else b"cut\n")
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        training.train(configured(words_for(material, tmp_path)))
    assert str(path if "weights" not in part else path.parent) in str(caught.value)


def test_an_impossible_token_makes_an_infinite_perplexity_in_json(
    finished: dict[str, Path], material: Path, tmp_path: Path
) -> None:
    words = [*words_for(material, finished["t5"]), "knn.lambda=1.0", "knn.k=1", "evaluation.metrics=[]"]
    done = evaluation.evaluate_pairs(configured([*words, f"evaluation.out_dir={tmp_path}"]))
    assert done is not None
    assert done.figures["knn"]["perplexity"] == "inf"
    for name in ("results.json", "examples.jsonl"):
        assert "Infinity" not in (tmp_path / name).read_text()


def test_shards_of_another_store_are_rejected(material: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    more = [f"data.dataset_dir={finished['t5']}/dataset", f"model.checkpoint={finished['t5']}/model"]
    words = [*words_for(material, tmp_path), *more]
    saving.save_store(configured(words))
    with pytest.raises(ValueError, match="has key_tap 'last_ffn_input', that of this command is 'final_hidden'"):
        saving.save_store(configured([*words, "knn.key_type=final_hidden"]))


@pytest.mark.parametrize("program", [*STAGES, "pipeline"])
def test_a_program_ends_a_mistake_with_one_line(program: str, loaded: Forks, tmp_path: Path) -> None:
    done = loaded.start(f"examples/pipeline/{program}.py", "knn.kk=3", f"folder={tmp_path}")
    assert done.wait() == 2
    assert done.err == f"{program}.py: error: unknown key knn.kk (did you mean 'k'?)\n"
    assert not list(tmp_path.iterdir())


def test_every_key_is_explained_and_main_yaml_has_the_documented_ones() -> None:
    paths = dict(leaves(PipelineConfig))
    assert all(paths.values())
    document = (
        "knn.store_dir knn.store_size knn.temperature knn.k knn.lambda knn.use_gpu knn.enable_retomaton "
        "data.train_path data.val_path data.train_batch_size data.eval_batch_size model.name model.checkpoint "
        "model.enable_knn training.out_name training.num_epochs training.learning_rate training.warmup_steps "
        "training.gradient_accumulation_steps training.max_num_checkpoints training.eval_iters training.save_interval "
        "training.log_interval deepspeed.zero_optimization.stage"
    ).split()
    assert set(document) <= set(paths)
    config = configured([])
    assert dataclasses.is_dataclass(config)
    assert config.knn.store_dir == "output/pipeline/store"
    assert os.path.dirname(config.model.name) == config.folder
