"""examples/pipeline with tiny models: the four stages, kills in each, one and two processes, and every mistake."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable
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

from fairseq.config.trees import leaves  # noqa: E402
from fairseq.hf.pipeline import evaluation, saving, training  # noqa: E402
from fairseq.hf.pipeline.config import PipelineConfig, read_config  # noqa: E402
from fairseq.memory.datastore.datastore import Datastore  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "pipeline"
SPECIAL = ["<pad>", "</s>", "<unk>"]
STAGES = ("generate", "train", "store", "eval")


def pairs(num: int, seed: int) -> list[tuple[str, str]]:
    """Words and the same words of another language, the last one first."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(12, size=rng.integers(1, 7)) for _ in range(num)]
    return [(" ".join(f"e{n}" for n in words), " ".join(f"r{n}" for n in words[::-1])) for words in drawn]


def write_jsonl(path: Path, lines: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"input": one, "output": other}) + "\n" for one, other in lines))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs and models without dropout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("pairs")
    train = pairs(50, 0)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "val.jsonl", [*train[3:12], *pairs(6, 1)])
    words = [f"{language}{n}" for language in "er" for n in range(12)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    for name in ("t5", "gpt2"):
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if name == "t5":
            core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": 1}
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        sizes |= {"dropout_rate": 0.0, "initializer_factor": 1.5}
        if name == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
            sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.AutoConfig.for_model(name, vocab_size=len(vocabulary), **ids, **sizes)
        kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
        torch.manual_seed(3)
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def words_for(material: Path, folder: Path, model: str = "t5") -> list[str]:
    """Overrides of main.yaml for a tiny run into a folder."""
    return [
        f"folder={folder}",
        f"data.train_path={material}/train.jsonl",
        f"data.val_path={material}/val.jsonl",
        f"model.name={material}/{model}",
        "data.train_batch_size=6",
        "data.eval_batch_size=4",
        "data.max_input_length=12",
        "data.max_output_length=9",
        "training.num_epochs=2",
        "training.warmup_steps=3",
        "training.gradient_accumulation_steps=2",
        "training.save_interval=4",
        "training.eval_iters=2",
        "training.log_interval=1",
        "knn.k=8",
        "knn.index=flat",
        "knn.key_dtype=float32",
        "fabric.accelerator=cpu",
        "evaluation.metrics=[exact_match,bleu]",
    ]


def configured(words: list[str]) -> PipelineConfig:
    return read_config(words, FOLDER / "configs" / "main.yaml")


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


def files_of(folder: Path) -> dict[str, str]:
    """Digest of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_seconds(files: dict[str, str]) -> dict[str, str]:
    """All but the metadata of an index, which has seconds in it."""
    return {name: digest for name, digest in files.items() if not name.endswith(".l2.json")}


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "examples.jsonl").read_text().splitlines()]


def scored_by_hand(material: Path, folder: Path, model: str) -> list[tuple[list[float], np.ndarray, list[int]]]:
    """Each validation pair alone: log-probabilities of its output's tokens, their keys and the tokens."""
    path = folder / "model" / "step-00000010"
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
    path = finished[model] / "model" / "step-00000010"
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
    assert kept == ["step-00000008", "step-00000010"], "of 4, 8 and 10, the last two"


KILLS = {"generate": (0, 3), "train": (0, 2), "store": (1, 6), "eval": (0, 1)}
"""Renamings and removals of files before a kill."""


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
    import shutil

    parts = {"generate": "dataset", "train": "model", "store": "store", "eval": "evaluation"}
    shutil.copytree(finished["t5"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / parts[stage])
    config = configured(words_for(material, tmp_path))
    with dies_at_event(monkeypatch, event):
        stages[stage](config)
    assert not stages[stage](config).was_complete
    for name, digest in without_seconds(files_of(finished["t5"] / parts[stage])).items():
        assert files_of(tmp_path / parts[stage]).get(name) == digest, name
    assert not list(tmp_path.rglob("*.tmp"))


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


def test_two_processes_train_and_save_what_one_does(
    finished: dict[str, Path], material: Path, loaded: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "store", "eval"):
        port, started = str(free_port()), []
        for rank in ("0", "1"):
            words = words_for(material, tmp_path)
            words.append(f"data.dataset_dir={finished['t5']}/dataset")
            if name != "train":
                words.append(f"model.checkpoint={finished['t5']}/model")
            with monkeypatch.context() as patch:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                more = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "one",
                    "GROUP_RANK": "0",
                }
                for variable, value in (world | more).items():
                    patch.setenv(variable, value)
                started.append(loaded.start(f"examples/pipeline/{name}.py", *words))
        for process in started:
            assert process.wait(120) == 0, process.err[-3000:]
    logs = [[json.loads(line) for line in (at / "model" / "log.jsonl").open()] for at in (finished["t5"], tmp_path)]
    assert len(logs[0]) == len(logs[1]) == 13
    for one, two in zip(*logs):
        assert one.keys() == two.keys()
        assert all(one[name] == pytest.approx(two[name], abs=1e-5) for name in one)
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
    training.train(one)
    logs = [[json.loads(line) for line in (at / "model" / "log.jsonl").open()] for at in (finished["t5"], tmp_path)]
    for halves, whole in zip(*logs, strict=True):
        assert halves == pytest.approx(whole, abs=1e-5)


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


# mistake -> (stage, overrides, parts of the message); {base} is the folder of a finished run, {here} an empty one
MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "an unknown key": ("generate", ["knn.temprature=2"], ["unknown key knn.temprature", "'temperature'"]),
    "an unknown section": ("generate", ["knnn.k=2"], ["unknown key knnn", "'knn'"]),
    "a key of another section": ("generate", ["knn.seed=2"], ["unknown key knn.seed; it belongs to training.seed"]),
    "a missing key": ("generate", ["--config", "{here}/lacks.yaml"], ["knn.store_dir is missing"]),
    "another type": ("train", ["knn.k=many"], ["knn.k: 'many' is not a whole number"]),
    "a value out of range": ("train", ["knn.lambda=1.5"], ["knn.lambda must be at most 1.0, got 1.5"]),
    "two ZeRO stages": ("train", ["fabric.strategy=deepspeed_stage_3"], ["deepspeed_stage_3", "stage is 2"]),
    "no DeepSpeed": ("train", ["fabric.strategy=deepspeed"], ["needs the package deepspeed"]),
    "no GPU": ("train", ["fabric.strategy=fsdp"], ["fabric.strategy fsdp needs a GPU"]),
    "no object": ("generate", ["data.val_path={here}/list.jsonl"], ["list.jsonl:2: [1] is not an object"]),
    "no field": ("generate", ["data.val_path={here}/field.jsonl"], ["field.jsonl:1: no 'output'; it has 'input'"]),
    "no JSON": ("generate", ["data.val_path={here}/broken.jsonl"], ["broken.jsonl:1: not JSON"]),
    "no file": ("generate", ["data.val_path={here}/none.jsonl"], ["no such file", "none.jsonl"]),
    "not generated": ("train", ["data.dataset_dir={here}/none"], ["holds no finished data set; run generate.py"]),
    "other lengths": ("train", ["data.max_output_length=7"], ["was made with lengths [12, 9], now it is [12, 7]"]),
    "another run": ("train", ["training.learning_rate=1e-5"], ["training.learning_rate 0.004, now it is 1e-05"]),
    "long warmup": ("train", ["training.warmup_steps=99"], ["warmup_steps 99 is more than the 10 steps"]),
    "nothing trained": ("store", ["training.out_name={here}/none"], ["holds no checkpoint; run train.py"]),
    "another size": ("store", ["knn.store_size=7"], ["knn.store_size is 7 and the training pairs make", "235 rows"]),
    "another kind of model": ("eval", ["model.checkpoint={material}/gpt2"], ["model_type is gpt2", "is t5"]),
    "an untrained model": ("eval", ["model.checkpoint={material}/t5"], ["was saved with another model"]),
    "no store": ("eval", ["knn.store_dir={here}"], ["holds no finished datastore; run store.py"]),
    "a large k": ("eval", ["knn.k=9999"], ["knn.k is 9999 and datastore", "has 235 rows"]),
    "another size of the store": ("eval", ["knn.store_size=7"], ["knn.store_size is 7 and datastore", "235 rows"]),
}


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
    (tmp_path / "list.jsonl").write_text('{"input": "e1", "output": "r1"}\n[1]\n')
    (tmp_path / "field.jsonl").write_text('{"input": "e1"}\n')
    (tmp_path / "lacks.yaml").write_text("knn:\n  k: 3\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    named = [word.format(base=finished["t5"], here=tmp_path, material=material) for word in overrides]
    before = files_of(finished["t5"])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the long part began")

    for module in (training, saving, evaluation):
        monkeypatch.setattr(module, "launch", never)
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        stages[stage](configured([*words_for(material, finished["t5"]), *named]))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert files_of(finished["t5"]) == before


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
