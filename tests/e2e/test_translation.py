"""Translation from text to scores, by the commands that users have."""

import json
import math
import re

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU

from fairseq.checkpoint_utils import load_checkpoint
from fairseq.data.dictionary import Dictionary
from fairseq.generation.foreign_overrides import split_overrides
from fairseq.generation.save_datastore import StoreText
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.tasks.configs import TranslationConfig
from fairseq.tasks.translation import TranslationTask
from fairseq_cli import generate, interactive, preprocess, save_datastore, train, validate
from fairseq_cli.memory import train_combiner

MODEL = (
    "--task translation --arch transformer_tiny --encoder-layers 1 --decoder-layers 1 --dropout 0 --optimizer adam "
    "--adam-betas (0.9,0.98) --lr 0.01 --lr-scheduler inverse_sqrt --warmup-updates 10 --criterion "
    "label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 400 --share-decoder-input-output-embed "
    "--decoder-normalize-before --cpu --no-progress-bar --num-workers 0 --no-epoch-checkpoints --log-interval 50"
).split()


def sentence(rng):
    return [int(word) for word in rng.integers(12, size=int(rng.integers(2, 9)))]


def write_pairs(folder, name, count, seed):
    """A language of 12 words and its translation: each word has one of its own, odd ones are followed by a mark."""
    rng = np.random.default_rng(seed)
    words = [sentence(rng) for _ in range(count)]
    source = "\n".join(" ".join(f"s{word}" for word in line) for line in words)
    target = "\n".join(" ".join(f"t{word} !" if word % 2 else f"t{word}" for word in line) for line in words)
    (folder / f"{name}.xx").write_text(source + "\n", encoding="utf-8")
    (folder / f"{name}.yy").write_text(target + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (name, count) in enumerate((("train", 600), ("valid", 60), ("test", 40))):
        write_pairs(folder, name, count, seed)
    texts = [f"--{name}pref={folder / name}" for name in ("train", "valid", "test")]
    preprocess.main(["--source-lang", "xx", "--target-lang", "yy", *texts, "--destdir", str(folder / "bin")])
    return folder / "bin"


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train.main([str(data), *MODEL, "--max-update", "220", "--save-dir", str(folder)])
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def store(data, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "train"
    words = ["--path", str(model), "--dstore-mmap", str(folder), "--max-tokens", "300", "--cpu"]
    save_datastore.main([str(data), *words])
    return folder


def lines_of(capsys, command, *words):
    capsys.readouterr()
    command(list(map(str, words)))
    return capsys.readouterr().out.splitlines()


def test_training_learns_resumes_and_validates(data, model, tmp_path, caplog):
    figures = load_checkpoint(str(model)).progress["figures"]
    assert figures["ppl"] < 6
    for updates in (5, 9):
        train.main([str(data), *MODEL, "--max-update", str(updates), "--save-dir", str(tmp_path / "cut")])
    train.main([str(data), *MODEL, "--max-update", "9", "--save-dir", str(tmp_path / "whole")])
    cut, whole = (load_checkpoint(str(tmp_path / name / "checkpoint_last.pt")) for name in ("cut", "whole"))
    assert all(torch.equal(cut.model[name], value) for name, value in whole.model.items())
    caplog.set_level("INFO")
    validate.main([str(data), "--path", str(model), "--cpu", "--log-format", "json"])
    shown = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")][-1]
    assert shown["valid_loss"] == pytest.approx(figures["loss"], abs=6e-4)


def test_validation_translates_and_decides_by_bleu(data, tmp_path, caplog):
    caplog.set_level("INFO")
    options = [
        "--eval-bleu",
        "--eval-bleu-args",
        '{"beam": 2, "max_len_a": 1.2, "max_len_b": 10}',
        "--max-update",
        "60",
    ]
    options += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric", "--eval-bleu-print-samples"]
    words = [str(data), *MODEL, *options, "--save-dir", str(tmp_path), "--validate-interval-updates", "30"]
    train.main([*words, "--log-format", "json", "--eval-bleu-detok", "space"])
    figures = [json.loads(r.message) for r in caplog.records if '"valid_bleu"' in r.message]
    best = load_checkpoint(str(tmp_path / "checkpoint_best.pt"))
    shown = max(float(figure["valid_bleu"]) for figure in figures)
    assert best.progress["figures"]["bleu"] == pytest.approx(shown, abs=0.01)
    generate.main(
        [str(data), "--path", str(tmp_path / "checkpoint_best.pt"), "--gen-subset", "valid", "--beam", "2", "--cpu"]
        + ["--max-len-a", "1.2", "--max-len-b", "10", "--results-path", str(tmp_path), "--scoring", "sacrebleu"]
    )
    report = json.loads((tmp_path / "generate-valid.run.json").read_text())
    assert report["figures"]["bleu"] == pytest.approx(shown, abs=0.01)
    with pytest.raises(ValueError, match="--eval-bleu-args: there is no setting 'beams' \\(did you mean 'beam'"):
        train.main([*words, "--eval-bleu-args", '{"beams": 2}', "--max-update", "90"])


def test_texts_are_read_as_fairseq_batches_them(data):
    task = TranslationTask(TranslationConfig(data=str(data)))
    assert (task.source_lang, task.target_lang) == ("xx", "yy")
    dataset = task.blocks("test")
    batch = dataset.collate([0, 1, 2, 3])
    sizes = dataset.source_sizes[batch.ids_B.numpy()]
    assert (np.diff(sizes) <= 0).all(), "longer sources come first"
    for row, number in enumerate(batch.ids_B.tolist()):
        source = batch.source_BS[row]
        assert source[: len(source) - sizes[row]].eq(1).all(), "sources are padded on the left"
        assert source[len(source) - sizes[row] :].tolist() == dataset.source(number).tolist()
        target = batch.target_BT[row][batch.scored_BT[row]].tolist()
        assert target == dataset.target(number).tolist()
        assert batch.tokens_BT[row, : len(target)].tolist() == [2, *target[:-1]]


def test_generated_lines_and_scores(data, model, capsys, tmp_path):
    out = lines_of(
        capsys, generate.main, data, "--path", model, "--beam", 3, "--nbest", 2, "--cpu", "--scoring", "sacrebleu"
    )
    kinds = [re.match(r"([STHDP])-(\d+)\t", line) for line in out]
    counted = [hit.group(1) for hit in kinds if hit]
    assert counted == list("STHDPHDP") * 40
    texts = {(hit.group(1), int(hit.group(2))): line.split("\t")[-1] for hit, line in zip(kinds, out) if hit}
    best = {}
    for hit, line in zip(kinds, out):
        if hit and hit.group(1) == "H":
            best.setdefault(int(hit.group(2)), line.split("\t"))
    reference = [texts["T", n] for n in range(40)]
    score = BLEU().corpus_score([best[n][2] for n in range(40)], [reference])
    assert score.score > 12
    assert out[-6] == f"Generate test with beam=3: {score.format()}"
    assert "tok:13a" in out[-5]
    log = [float(p) for p in next(line for line in out if line.startswith("P-7")).split("\t")[1].split()]
    assert float(best[7][1]) == pytest.approx(sum(log) / len(log), abs=2e-4)
    words = ["--beam", "3", "--cpu", "--results-path", str(tmp_path), "--quiet", "--prove", "20"]
    generate.main([str(data), "--path", str(model), *words])
    assert (tmp_path / "generate-test.hyp").read_text().splitlines() == [best[n][2] for n in range(40)]
    assert (tmp_path / "generate-test.txt").read_text().startswith("Generate test with beam=3: BLEU4 = ")
    figures = json.loads((tmp_path / "generate-test.run.json").read_text())["figures"]
    assert figures["sentences"] == 40
    assert [figures["proof"][name]["passed"] for name in ("mass", "causality", "order")] == [True, True, None]


def test_each_shard_writes_its_own_files(data, model, tmp_path):
    def translate(*words):
        generate.main([str(data), "--path", str(model), "--beam", "2", "--cpu", *words])

    translate("--results-path", str(tmp_path / "whole"))
    for shard in range(3):
        words = ["--num-shards", "3", "--shard-id", str(shard), "--max-sentences", "24"]
        translate("--results-path", str(tmp_path / "parts"), *words)
    for kind in ("hyp", "ref"):
        parts = [(tmp_path / "parts" / f"generate-test.shard{shard}of3.{kind}").read_text() for shard in range(3)]
        assert sorted("".join(parts).splitlines()) == sorted(
            (tmp_path / "whole" / f"generate-test.{kind}").read_text().splitlines()
        )
        assert parts[0]
        assert parts[2] == "", "40 sentences make two batches: the third shard has none"
    assert (tmp_path / "parts" / "generate-test.shard2of3.txt").read_text() == ""
    translate("--results-path", str(tmp_path / "whole"), "--score-reference")
    assert "BLEU" not in (tmp_path / "whole" / "generate-test.txt").read_text()
    assert not (tmp_path / "whole" / "generate-test.hyp").exists(), "the references are no hypotheses"


def test_references_are_scored(data, model, capsys):
    out = lines_of(capsys, generate.main, data, "--path", model, "--score-reference", "--cpu")
    task = TranslationTask(TranslationConfig(data=str(data)))
    loaded = task.load_model(load_checkpoint(str(model)), str(model), None, generate.RuntimeConfig(cpu=True))
    dataset = task.blocks("test")
    for number in (0, 11, 39):
        target = torch.from_numpy(dataset.target(number))
        tokens = torch.cat([torch.tensor([2]), target[:-1]])[None]
        hidden = loaded(tokens, source_BS=torch.from_numpy(dataset.source(number))[None]).hidden_BTD[0]
        logp = loaded.vocab_logp(hidden).gather(1, target[:, None])[:, 0] / math.log(2)
        shown = next(line for line in out if line.startswith(f"P-{number}\t")).split("\t")[1].split()
        assert [float(p) for p in shown] == pytest.approx(logp.tolist(), abs=1e-4)


def test_a_store_holds_every_target_position(data, model, store):
    task = TranslationTask(TranslationConfig(data=str(data)))
    dataset = task.blocks("train")
    opened = Datastore.open(store, StoreHints())
    assert len(opened) == dataset.target_sizes.sum()
    loaded = task.load_model(load_checkpoint(str(model)), str(model), None, generate.RuntimeConfig(cpu=True))
    keys = np.fromfile(store / "keys.npy", np.float32).reshape(len(opened), -1)
    values = np.fromfile(store / "vals.npy", np.int64)
    assert opened.metadata["key_tap"] == "model_output"
    found = {}
    row = 0
    for batch in task.training_batches(
        dataset, max_tokens=300, max_sentences=None, multiple=8, seed=1, max_positions=loaded.max_positions
    ):
        for number in dataset.collate(batch).ids_B.tolist():
            found[number] = row
            row += int(dataset.target_sizes[number])
    for number in (0, 100, 599):
        target = dataset.target(number)
        first = found[number]
        assert values[first : first + len(target)].tolist() == target.tolist()
        tokens = torch.from_numpy(np.concatenate([[2], target[:-1]]))[None]
        with torch.no_grad():
            out = loaded(tokens, "model_output", source_BS=torch.from_numpy(dataset.source(number))[None])
        np.testing.assert_allclose(keys[first : first + len(target)], out.key_BTD[0].numpy(), atol=1e-5)


def test_neighbors_by_flags_and_by_overrides_are_the_same(data, model, store, capsys):
    words = (data, "--path", model, "--beam", 3, "--cpu")
    plain = lines_of(capsys, generate.main, *words)
    flags = ("--knnmt", "--dstore-filename", store, "--k", 4, "--lmbda", 0.5, "--knn-temp", 5)
    by_flags = lines_of(capsys, generate.main, *words, *flags)
    overrides = {"use_knn_datastore": True, "load_knn_datastore": True, "dstore_filename": str(store), "k": 4}
    overrides |= {"knn_lambda_type": "fix", "knn_lambda_value": 0.5, "knn_temperature_value": 5}
    overrides |= {"knn_sim_func": "do_not_recomp_l2", "knn_temperature_type": "fix", "use_gpu_to_search": True}
    assert lines_of(capsys, generate.main, *words, "--model-overrides", overrides) == by_flags
    assert by_flags != plain
    assert lines_of(capsys, generate.main, *words, *flags[:-3], 0, *flags[-2:]) == plain, "no weight, no change"


@pytest.mark.parametrize("kind", ["adaptive", "kster", "robust"])
def test_a_trained_combiner_translates_and_scores(kind, data, model, store, capsys, tmp_path):
    neighbors = ("--dstore-filename", store, "--knn-temp", 5, "--max-tokens", 300, "--cpu")
    file = tmp_path / "combiner.safetensors"
    words = (data, "--path", model, *neighbors, "--k", 6, "--kind", kind, "--max-epoch", 8, "--lr", 0.01, "--out", file)
    out = lines_of(capsys, train_combiner.main, *words)
    losses = re.fullmatch(r"held-out loss of \d+ tokens: model alone ([\d.]+), \w+ ([\d.]+) nats .*", out[0])
    assert float(losses[2]) < float(losses[1])
    assert json.loads((tmp_path / "combiner.run.json").read_text())["figures"]["epochs"] <= 8
    words = (data, "--path", model, "--cpu", "--knnmt", "--knn-lambda-type", kind, "--combiner", file)
    words = (*words, "--dstore-filename", store)
    plain = lines_of(capsys, generate.main, data, "--path", model, "--beam", 3, "--cpu")
    assert lines_of(capsys, generate.main, *words, "--beam", 3) != plain
    # What a whole vocabulary is mixed to is what the references are scored by: a text that is forced step by step.
    scored = lines_of(capsys, generate.main, *words, "--score-reference")
    assert not [line for line in scored if "BLEU" in line]
    forced = lines_of(capsys, generate.main, *words, "--beam", 1, "--prefix-size", 100)
    for number in range(0, 40, 7):
        one, two = (
            next(line for line in lines if line.startswith(f"P-{number}\t")).split("\t")[1].split()
            for lines in (scored, forced)
        )
        assert [float(p) for p in one] == pytest.approx([float(p) for p in two], abs=3e-4)
    for more, message in (
        (("--k", 4), "was trained with --k 6, not 4; give --k 6"),
        (("--knn-temp", 9), "was trained with --knn-temp 5.0, not 9.0; give --knn-temp 5.0"),
        (("--knn-sim-func", "dot"), "was trained for similarities of kind recompute, this is dot"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.main(list(map(str, (*words, *more))))


def test_typed_lines_are_translated(data, model, capsys, monkeypatch, tmp_path):
    lines = ["s1 s2 s3", "", "s4 s4 s5 s6 s7", "s9 unseen s1"]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    words = (data, "--path", model, "--beam", 3, "--cpu", "--input", tmp_path / "lines")
    one = lines_of(capsys, interactive.main, *words)
    many = lines_of(capsys, interactive.main, *words, "--buffer-size", 10)
    keep = [line for line in one if line[0] in "SHD"]
    assert [line.split("\t")[-1] for line in keep] == [line.split("\t")[-1] for line in many if line[0] in "SHD"]
    assert [line.split("\t")[-1] for line in keep if line[0] == "S"] == ["s1 s2 s3", "", lines[2], "s9 <unk> s1"]
    assert keep[4].split("\t")[-1] == "", "an empty line has an empty translation"


def test_python_translates_too(data, model, capsys):
    from fairseq.models.transformer import TransformerModel

    hub = TransformerModel.from_pretrained(
        str(model.parent), "checkpoint_last.pt", str(data), source_lang="xx", target_lang="yy"
    )
    out = lines_of(capsys, generate.main, data, "--path", model, "--beam", 5, "--cpu")
    sources = [line.split("\t")[1] for line in out if line.startswith("S-")]
    expected = [line.split("\t")[2] for line in out if line.startswith("H-")]
    assert hub.translate(sources) == expected
    assert hub.translate(sources[3]) == expected[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source-lang", "xx", "--target-lang", "zz"], "holds xx-yy; name languages of it"),
        (["--gen-subset", "other"], "no split 'other' of xx-yy in .*, which holds: test, train, valid"),
        (["--beam", "0"], "--beam must be at least 1, got 0"),
        (["--prefix-size", "9", "--max-len-b", "3"], "--prefix-size 9 begins texts that --max-len-b 3 ends before"),
        (["--bpe", "subword_nmt"], "--bpe subword_nmt needs --bpe-codes FILE; give it"),
        (["--knnmt"], "--knnmt needs --dstore-filename"),
        (["--knnmt", "--dstore-filename", "x/y"], "no datastore at 'x/y': .* save one with save_datastore.py$"),
        (["--unkpen", "nan"], "--unkpen must be at least"),
        (["--score-reference", "--nbest", "2"], "--score-reference scores the one reference .* --nbest 2"),
        (["-s", "yy", "-t", "xx"], "translates xx-yy, yy-xx is asked for; give --source-lang xx --target-lang yy"),
        (["--model-overrides", "{'max_source_positions': 4}"], "sentence \\d+ has .* the model reads at most 4"),
        (
            ["--knnmt", "--dstore-filename", "x", "--knn-lambda-type", "trime"],
            "--knn-lambda-type trime is about inner products, the index's metric is l2",
        ),
        (["--knnmt", "--dstore-filename", "x", "--knn-lambda-type", "adaptive"], "adaptive needs --combiner FILE"),
        (
            ["--knnmt", "--dstore-filename", "x", "--combiner", "y"],
            "--combiner y is not read with --knn-lambda-type fix",
        ),
        (
            ["--model-overrides", "{'use_knn_datastore': True, 'knn_lambda_type': 'trainable'}"],
            "knn_lambda_type 'trainable' would need the networks .* --knn-lambda-type adaptive --combiner FILE",
        ),
        (["--compat-trime-mass"], "--compat-trime-mass belongs to --knn-lambda-type trime"),
        (
            ["--max-source-positions", "4"],
            "sentence \\d+ has \\d+ source and \\d+ target tokens, the model reads at most 4",
        ),
        (["--path", "nothing.pt"], "--path: no checkpoint at 'nothing.pt'"),
    ],
)
def test_mistakes_are_named(data, model, words, message):
    with pytest.raises(ValueError, match=message):
        generate.main([str(data), "--path", str(model), "--cpu", *words])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": "x"}, "--model-overrides: k 'x' is not a whole number"),
        ({"probe": 2.5}, "--model-overrides: probe 2.5 is not a whole number"),
        ({"knn_lambda_value": None, "knn_temperature_value": "10"}, "knn_temperature_value '10' is not a number"),
        ({"only_use_max_idx": True}, "only_use_max_idx True is not offered"),
        ({"knn_k_type": "trainable"}, "knn_k_type 'trainable' is not offered"),
    ],
)
def test_overrides_that_mean_nothing_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        split_overrides({"use_knn_datastore": True, "dstore_filename": "store"} | given)


def test_a_store_of_other_things_is_rejected(data, model, store, tmp_path):
    words = [str(data), "--path", str(model), "--cpu", "--knnmt", "--lmbda", "0.3", "--dstore-filename"]
    rng = np.random.default_rng(0)
    rng.random((50, 16), np.float32).tofile(tmp_path / "keys.npy")
    rng.integers(4, 9, 50).tofile(tmp_path / "vals.npy")
    with pytest.raises(ValueError, match="12800|50"):
        generate.main([*words, str(tmp_path), "--dstore-size", "50"])
    wanted = r"--dstore-size 7 does not fit: split 'train' has \d+ target tokens"
    with pytest.raises(ValueError, match=wanted):
        save_datastore.main(
            [str(data), "--path", str(model), "--dstore-mmap", str(tmp_path / "s"), "--dstore-size", "7", "--cpu"]
        )


def test_sides_of_different_length_are_rejected_with_both_counts(tmp_path):
    write_pairs(tmp_path, "train", 20, 0)
    with open(tmp_path / "train.yy", "a", encoding="utf-8") as file:
        file.write("t1\n")
    words = ["--source-lang", "xx", "--target-lang", "yy", "--trainpref", str(tmp_path / "train")]
    with pytest.raises(ValueError, match="has 20 lines, .* has 21; each line"):
        preprocess.main([*words, "--destdir", str(tmp_path / "bin")])


def test_a_dictionary_of_another_pair_is_rejected(data, model, tmp_path):
    for name in data.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    swapped = Dictionary.load(data / "dict.yy.txt")
    swapped.symbols[5], swapped.symbols[6] = swapped.symbols[6], swapped.symbols[5]
    (tmp_path / "dict.yy.txt").write_bytes(swapped.to_bytes())
    with pytest.raises(ValueError, match="trained with another dictionary"):
        generate.main([str(tmp_path), "--path", str(model), "--cpu"])


class Died(BaseException):
    """Stands for a kill."""


def dies_at(monkeypatch, owner, name, call):
    """Let call number ``call`` of a method die."""
    original, calls = getattr(owner, name), []

    def dying(self, *words):
        calls.append(name)
        if len(calls) == call:
            raise Died
        return original(self, *words)

    monkeypatch.setattr(owner, name, dying)


def test_an_interrupted_translation_leaves_nothing_half_done(data, model, tmp_path, monkeypatch):
    from fairseq.generation.next_token import NextToken

    def words(folder):
        settings = ["--beam", "2", "--cpu", "--max-tokens", "60", "--results-path", str(tmp_path / folder)]
        return [str(data), "--path", str(model), *settings]

    generate.main(words("whole"))
    with monkeypatch.context() as patch:
        dies_at(patch, NextToken, "logp", 25)
        with pytest.raises(Died):
            generate.main(words("cut"))
    assert not list((tmp_path / "cut").glob("generate*"))
    generate.main(words("cut"))
    for name in ("generate-test.txt", "generate-test.hyp", "generate-test.ref"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("call", [1, 3, 8])
def test_an_interrupted_store_is_gone_on_with(data, model, store, tmp_path, monkeypatch, call, caplog):
    from fairseq.memory.datastore import writer
    from fairseq.sequence_scorer import SequenceScorer

    words = ["--path", str(model), "--dstore-mmap", str(tmp_path / "cut"), "--max-tokens", "300", "--cpu"]
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with monkeypatch.context() as patch:
        dies_at(patch, SequenceScorer, "keys", call)
        with pytest.raises(Died):
            save_datastore.main([str(data), *words])
    with pytest.raises(ValueError, match="is not complete|no datastore at"):
        Datastore.open(tmp_path / "cut")
    caplog.set_level("INFO")
    save_datastore.main([str(data), *words])
    assert ("resuming at row" in caplog.text) == (call > 1)
    for name in ("keys.npy", "vals.npy", "docs.npy"):
        assert (tmp_path / "cut" / name).read_bytes() == (store / name).read_bytes()


def test_a_complete_store_of_other_things_stays(data, model, tmp_path, capsys, monkeypatch):
    def save(*words):
        place = ["--path", str(model), "--dstore-mmap", str(tmp_path / "s"), "--cpu", "--max-tokens", "300"]
        return lines_of(capsys, save_datastore.main, data, *place, *words)

    assert save("--valid-subset", "valid")[0].startswith("saved ")
    before = (tmp_path / "s" / "keys.npy").read_bytes()
    assert save("--valid-subset", "valid") == [f"{tmp_path}/s/ is complete already; --overwrite-dstore saves it again"]
    with monkeypatch.context() as patch:
        patch.setattr(TranslationTask, "load_model", None)  # each is named before a model is loaded
        for words, message in (
            (("--valid-subset", "test"), "complete and its split is 'valid', that of this command is 'test'; name"),
            (
                ("--valid-subset", "valid", "--dstore-fp16"),
                "type of keys is 'float32', .* is 'float16'",
            ),
            (("--valid-subset", "valid", "--knn-keytype", "last_ffn_input"), "kind of keys is 'model_output'"),
            (("--valid-subset", "valid", "--model-overrides", {"dropout": 0.5}), "list of model settings is"),
        ):
            with pytest.raises(ValueError, match=message):
                save(*words)
    with pytest.raises(ValueError, match="its cut of the text into batches is"):
        save("--valid-subset", "valid", "--max-sentences", "8")
    assert (tmp_path / "s" / "keys.npy").read_bytes() == before
    assert save("--valid-subset", "test", "--overwrite-dstore")[0].startswith("saved ")
    assert Datastore.open(tmp_path / "s").metadata["subset"] == "test"
    (tmp_path / "s" / "datastore.json").unlink()
    with pytest.raises(ValueError, match="keys.npy.* would be overwritten and are of no datastore of ours"):
        save("--valid-subset", "test")


def test_a_save_resumes_with_the_same_batches_only(data):
    task = TranslationTask(TranslationConfig(data=str(data)))
    dataset = task.blocks("train")
    one, two = np.flatnonzero(dataset.source_sizes == dataset.source_sizes[0])[:2]
    together, apart = (StoreText(task, "train", dataset, cut) for cut in ([[one, two]], [[one], [two]]))
    assert together.ids.tolist() == apart.ids.tolist()
    assert together.batches_digest() != apart.batches_digest()
    cut = TranslationTask(TranslationConfig(data=str(data), truncate_source=True, max_source_positions=3))
    shorter = StoreText(cut, "train", cut.blocks("train"), [[one, two]])
    assert shorter.batches_digest() != together.batches_digest()


def test_the_models_own_limit_of_sources_is_named(data, tmp_path):
    words = ["--encoder-learned-pos", "--max-source-positions", "6", "--max-update", "1", "--save-dir", str(tmp_path)]
    train.main([str(data), *MODEL, *words, "--skip-invalid-size-inputs-valid-test"])
    words = [str(data), "--path", str(tmp_path / "checkpoint_last.pt"), "--cpu"]
    message = r"sentence \d+ has \d+ source.* tokens, the model reads at most 6"
    with pytest.raises(ValueError, match=message):
        generate.main(words)
    with pytest.raises(ValueError, match=message):
        save_datastore.main([*words, "--dstore-mmap", str(tmp_path / "s"), "--valid-subset", "test"])
    (tmp_path / "line").write_text("s1 s2 s3 s4 s5 s6\n")
    with pytest.raises(ValueError, match="line 1 has 7 tokens, the model reads at most 6"):
        interactive.main([*words, "--input", str(tmp_path / "line")])
