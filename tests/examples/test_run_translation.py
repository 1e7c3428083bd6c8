"""examples/huggingface/run_translation.py with tiny models: every step a user takes, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
import types
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

Translation = Callable[..., str]
SPECIAL = ["<pad>", "</s>", "<unk>"]
PREFIX = "translate English to Romanian: "


def sentences(num: int, seed: int) -> list[tuple[str, str]]:
    """Sources and their translations, word by word, the last word first."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(30, size=rng.integers(2, 8)) for _ in range(num)]
    return [(" ".join(f"e{n}" for n in words), " ".join(f"r{n}" for n in words[::-1])) for words in drawn]


TRAIN = sentences(60, 0)
VALID = TRAIN[5:25] + sentences(4, 1)
"""Mostly sentences of the store, so that a random model learns from its memory."""
ROWS = sum(len(target.split()) + 1 for _, target in TRAIN)


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"translation": {"en": en, "ro": ro}}) + "\n" for en, ro in pairs))
    return path


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wmt16")
    for name, pairs in (("train", TRAIN), ("validation", VALID), ("test", VALID[::-1])):
        write_jsonl(folder / f"{name}.jsonl", pairs)
    return folder


def word_tokenizer() -> object:
    """Words to numbers, with the end of a sentence, as T5 and Marian have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*PREFIX.split(), *(f"{language}{n}" for language in "er" for n in range(30))]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


SIZES = {
    "t5": {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 1.5},
    "marian": {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 48, "init_std": 0.4,
        "forced_eos_token_id": None,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random models with a tokenizer of the words above."""
    found = {}
    for name, sizes in SIZES.items():
        tokenizer = word_tokenizer()
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), d_model=16, **ids, **sizes)
        torch.manual_seed(3)
        found[name] = tmp_path_factory.mktemp("tiny") / name
        transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def translation(
    examples: Path, models: dict[str, Path], pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Translation:
    """Run run_translation.py in this process, into ``tmp_path/out``; returns what it printed."""
    import run_translation

    def run(*words: object, model: str = "t5") -> str:
        given = [str(word) for word in words]
        languages = [] if "--source_lang" in given else ["--source_lang", "en", "--target_lang", "ro"]
        run_translation.main(
            ["--model_name_or_path", str(models[model]), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
            + ["--disable_tqdm", "1", *languages, *given]
        )
        return capsys.readouterr().out

    return run


def results(tmp_path: Path, name: str = "eval") -> dict:
    return json.loads((tmp_path / "out" / f"{name}_results.json").read_text())


def scored_by_hand(folder: Path, pairs: list[tuple[str, str]], prefix: str) -> list[float]:
    """Log-probability of each token of the references, one sentence at a time."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logp = []
    for source, target in pairs:
        ids = tokenizer(prefix + source, return_tensors="pt")["input_ids"]
        labels = tokenizer(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
        logp += scores.gather(1, labels[0, :, None])[:, 0].tolist()
    return logp


@pytest.mark.parametrize("model", sorted(SIZES))
def test_references_are_scored_and_sources_translated(
    model: str, translation: Translation, models: dict[str, Path], pairs_folder: Path, tmp_path: Path
) -> None:
    words = ("--validation_file", pairs_folder / "validation.jsonl", "--do_eval", "--source_prefix", PREFIX)
    words = (*words, "--predict_with_generate", "--num_beams", "3", "--max_target_length", "12")
    told = translation(*words, "--per_device_eval_batch_size=5", "--save_scores", tmp_path / "s.npz", model=model)
    logp = scored_by_hand(models[model], VALID, PREFIX)
    np.testing.assert_allclose(np.load(tmp_path / "s.npz")["logprob"], logp, atol=1e-5)
    kept = results(tmp_path)
    assert kept["perplexity"] == pytest.approx(math.exp(-np.mean(logp)), rel=1e-5)
    assert kept["num_tokens"] == len(logp)
    found = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    bare = transformers.AutoModelForSeq2SeqLM.from_pretrained(models[model]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[model])
    for line, (source, _) in zip(found, VALID, strict=True):
        ids = tokenizer(PREFIX + source, return_tensors="pt")["input_ids"]
        one = bare.generate(input_ids=ids, num_beams=3, max_length=12, do_sample=False)
        assert line == tokenizer.decode(one[0], skip_special_tokens=True).strip()
    import sacrebleu

    references = [[target for _, target in VALID]]
    assert kept["bleu"] == pytest.approx(sacrebleu.corpus_bleu(found, references).score)
    assert kept["chrf++"] == pytest.approx(sacrebleu.corpus_chrf(found, references, word_order=2).score)
    assert kept["signatures"]["bleu"].startswith("BLEU|nrefs:1|case:mixed|")
    assert kept["signatures"]["bleu"] in told
    assert kept["signatures"]["chrf++"].startswith("chrF2++|nrefs:1|")
    manifest = json.loads((tmp_path / "out" / "eval.run.json").read_text())
    assert manifest["figures"] == kept


@pytest.mark.parametrize("model", sorted(SIZES))
def test_the_commands_of_knn_transformers_run_as_they_are_printed(
    model: str, examples: Path, models: dict[str, Path], pairs_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import run_translation

    monkeypatch.chdir(tmp_path)
    name = "t5-small" if model == "t5" else "opus"
    shutil.copytree(models[model], tmp_path / name)
    shutil.copytree(pairs_folder, tmp_path / "wmt16" / "ro-en")
    shared = f"--model_name_or_path {name} --dataset_name wmt16 --dataset_config_name ro-en"
    out = f"--output_dir checkpoints-translation/{name} --source_lang en --target_lang ro"
    batch = "--per_device_train_batch_size 4 --per_device_eval_batch_size=4"
    store = f"--dstore_size {ROWS} --dstore_dir checkpoints-translation/{name}"
    prefix = '--source_prefix "translate English to Romanian: "'
    knn = "--knn_temp 50 --k 32 --lmbda 0.25"
    figures = {}
    for step, words in {
        "base": f"{shared} --per_device_eval_batch_size=4 {out} --do_eval --predict_with_generate {prefix}",
        "save": f"{shared} {batch} {out} {store} --save_knnlm_dstore --do_eval --eval_subset train {prefix}",
        "index": f"{shared} {batch} {out} {store} --build_index",
        "clusters": f"{shared} {out} {store} --cluster_dstore --num_clusters 30 --sample_size 20000000",
        "retomaton": f"{shared} --per_device_eval_batch_size=4 {out} --do_eval --predict_with_generate {prefix} "
        f"{store} {knn} --retomaton",
        "knn": f"{shared} --per_device_eval_batch_size=4 {out} --do_eval --predict_with_generate {prefix} "
        f"{store} {knn} --knn",
    }.items():
        run_translation.main([*shlex.split(words), "--use_cpu", "--max_target_length", "12"])
        if "predict_with_generate" in words:
            figures[step] = json.loads((tmp_path / "checkpoints-translation" / name / "eval_results.json").read_text())
    opened = Datastore.open(tmp_path / f"checkpoints-translation/{name}/dstore_{model}_{ROWS}_16")
    assert len(opened) == ROWS
    assert len(opened.documents.runs_R3) == len(TRAIN)
    for step in ("knn", "retomaton"):
        assert figures[step]["perplexity"] < figures["base"]["perplexity"]
        assert figures[step]["lm_perplexity"] == pytest.approx(figures["base"]["perplexity"], rel=1e-5)
        assert {"bleu", "chrf++", "num_sentences"} <= figures[step].keys()
    assert 0.0 < figures["retomaton"]["saved_share"] < 1.0
    assert 0.0 <= figures["retomaton"]["generation_saved_share"] < 1.0


def test_a_memory_of_the_sentences_improves_their_translation(
    translation: Translation, pairs_folder: Path, tmp_path: Path
) -> None:
    texts = ("--dataset_name", pairs_folder, "--dstore_dir", tmp_path / "store", "--max_target_length", "12")
    words = (*texts, "--do_eval", "--predict_with_generate", "--num_beams", "4")
    translation(*words)
    plain = results(tmp_path)
    plain_text = (tmp_path / "out" / "generated_predictions.txt").read_text()
    assert f"saved {ROWS} keys" in translation(*texts, "--eval_subset", "train", "--save_knnlm_dstore")
    translation(*words, "--knn", "--k", "8", "--lmbda", "0.9")
    assert results(tmp_path)["perplexity"] < 0.3 * plain["perplexity"]
    assert results(tmp_path)["bleu"] > plain["bleu"] + 30
    translation(*words, "--knn", "--k", "8", "--lmbda", "0")
    assert results(tmp_path)["perplexity"] == plain["perplexity"]
    assert (tmp_path / "out" / "generated_predictions.txt").read_text() == plain_text
    translation(*words, "--retomaton", "--k", "8", "--lmbda", "0.9", "--min_knns", "2", "--max_knns", "64")
    assert results(tmp_path)["perplexity"] < 0.5 * plain["perplexity"]
    assert results(tmp_path)["saved_share"] > 0.1
    translation(*words, "--retomaton", "--k", "8", "--no_pointer", "--knn_sim_func", "dot")
    assert results(tmp_path)["saved_share"] == 0.0
    translation(*texts, "--do_eval", "--do_predict", "--predict_with_generate", "--max_predict_samples", "3", "--bf16")
    assert results(tmp_path, "predict")["num_sentences"] == 3
    assert len((tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()) == 3
    assert len((tmp_path / "out" / "eval_generated_predictions.txt").read_text().splitlines()) == len(VALID)
    assert results(tmp_path)["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)


@pytest.mark.parametrize("model", sorted(SIZES))
def test_figures_do_not_depend_on_the_batch(
    model: str, translation: Translation, pairs_folder: Path, tmp_path: Path
) -> None:
    texts = ("--dataset_name", pairs_folder, "--dstore_dir", tmp_path / "store", "--do_eval")
    translation(*texts, "--eval_subset", "train", "--save_knnlm_dstore", model=model)
    found = []
    for size in (1, 5, 24):
        path = tmp_path / f"{size}.npz"
        words = (*texts, "--knn", "--k", "16", "--lmbda", "0.5", "--per_device_eval_batch_size", size)
        translation(*words, "--save_scores", path, model=model)
        found.append(np.load(path)["logprob"])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_training_changes_the_model_and_resumes(translation: Translation, pairs_folder: Path, tmp_path: Path) -> None:
    texts = ("--dataset_name", pairs_folder, "--do_eval")
    translation(*texts)
    plain = results(tmp_path)["perplexity"]
    words = (*texts, "--do_train", "--learning_rate", "0.02", "--lr_scheduler_type", "constant", "--save_steps", "2")
    translation(*words, "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "4")
    trained = results(tmp_path)["perplexity"]
    assert trained < 0.9 * plain
    translation(*words, "--max_steps", "5")
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5
    again = results(tmp_path)["perplexity"]
    translation(*texts, "--tokenizer_name", tmp_path / "out", "--model_name_or_path", tmp_path / "out")
    assert results(tmp_path)["perplexity"] == pytest.approx(again, rel=1e-4)


def test_every_layout_of_pairs_gives_the_same_ones(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from translation_arguments import TranslationArguments
    from translation_data import TextPair, read_pairs

    pairs = [("a b", "x\u2028y"), ("", "z")]
    expected = [TextPair(*pair) for pair in pairs]
    write_jsonl(tmp_path / "a.jsonl", pairs)
    (tmp_path / "b.json").write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs))
    (tmp_path / "own").mkdir()
    for name, column in (("en", 0), ("ro", 1)):
        text = "".join(f"{pair[column]}\n" for pair in pairs)
        for path in (tmp_path / f"c.{name}", tmp_path / "own" / f"valid.{name}", tmp_path / f"d-{name}.txt"):
            path.write_text(text)
    languages = {"source_lang": "en_XX", "target_lang": "ro_RO"}
    for given in ("a.jsonl", "b.json", "c", "d-en.txt,d-ro.txt"):
        paths = ",".join(str(tmp_path / part) for part in given.split(","))
        data = TranslationArguments(test_file=paths, **languages)
        data.check_files()
        assert read_pairs(data, "test") == expected, given
    assert read_pairs(TranslationArguments(test_file=str(tmp_path / "b.json")), "test", 1) == expected[:1]
    own = TranslationArguments(dataset_name=str(tmp_path), dataset_config_name="own", **languages)
    assert read_pairs(own, "validation") == expected
    (tmp_path / "own" / "dataset_dict.json").write_text("{}")
    rows = [{"translation": {"en": s, "ro": t}} for s, t in pairs]
    fake = types.SimpleNamespace(load_from_disk=lambda folder: {"validation": rows})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_pairs(own, "valid") == expected
    with pytest.raises(ValueError, match="unknown --eval_subset 'test'; it has: validation"):
        read_pairs(own, "test")


def letters(kind: str) -> object:
    """A multilingual tokenizer of letters."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *"abcdefgh"]
    if kind == "nllb":
        vocabulary = {name: number for number, name in enumerate(names)}
        return transformers.NllbTokenizer(
            vocab=vocabulary, merges=[], extra_special_tokens=["eng_Latn", "ron_Latn"], src_lang="eng_Latn"
        )
    made = transformers.MBartTokenizer if kind == "mbart" else transformers.MBart50Tokenizer
    return made(vocab=[(name, -float(number)) for number, name in enumerate(names)], src_lang="en_XX")


@pytest.mark.parametrize(
    ("kind", "model", "source", "target"),
    [
        ("nllb", "m2m_100", "eng_Latn", "ron_Latn"),
        ("mbart50", "mbart", "en_XX", "ro_RO"),
        ("mbart", "mbart", "en_XX", "ro_RO"),
    ],
)
def test_multilingual_models_are_told_their_languages(
    kind: str, model: str, source: str, target: str, translation: Translation, models: dict[str, Path], tmp_path: Path
) -> None:
    import translation_search
    from translation_arguments import TranslationArguments

    tokenizer = letters(kind)
    folder = tmp_path / kind
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    sizes = {key: value for key, value in SIZES["marian"].items() if key != "forced_eos_token_id"}
    config = transformers.AutoConfig.for_model(model, vocab_size=len(tokenizer), d_model=16, **ids, **sizes)
    torch.manual_seed(1)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    language = tokenizer.convert_tokens_to_ids(target)
    name = "decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id"
    data = TranslationArguments(test_file="x", source_lang=source, target_lang=target)
    assert translation_search.set_languages(tokenizer, data) == {name: language}
    code = source.split("_")[0]
    lines = [{"translation": {code: "ab cd"[n:], target.split("_")[0]: "hg fe"[n:]}} for n in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--source_lang", source, "--target_lang", target, "--dstore_dir", tmp_path / "store")
    words = (*words, "--model_name_or_path", folder, "--validation_file", tmp_path / "p.jsonl", "--do_eval")
    translation(*words, "--save_knnlm_dstore")
    values = np.asarray(Datastore.open(tmp_path / "store" / f"dstore_{model}_16").values).tolist()
    assert values.count(language) == 4
    translation(*words, "--predict_with_generate")
    plain = results(tmp_path)
    translation(*words, "--predict_with_generate", "--knn", "--k", "4", "--lmbda", "0.9", "--num_beams", "2")
    assert results(tmp_path)["perplexity"] < 0.5 * plain["perplexity"]
    found = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    assert sum(line == pair["translation"][target.split("_")[0]] for line, pair in zip(found, lines)) >= 2
    with pytest.raises(ValueError, match="--target_lang xx_YY is no token of"):
        translation(*(word if word != target else "xx_YY" for word in words))
    with pytest.raises(ValueError, match="is multilingual; give --source_lang and --target_lang"):
        translation_search.set_languages(tokenizer, TranslationArguments(test_file="x"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--do_eval", "--validation_file", "missing.jsonl"], "--validation_file: no such file: missing.jsonl"),
        (["--do_eval"], "no text: give --train_file"),
        (["--validation_file", "PAIRS"], "nothing to do: give --do_train"),
        (["--do_eval", "--validation_file", "PAIRS", "--eval_subset", "train"], "the subset train needs --train_file"),
        (["--do_eval", "--validation_file", "PAIRS", "--eval_subset", "vaild"], "unknown --eval_subset 'vaild'"),
        (["--do_eval", "--validation_file", "PAIRS", "--knn"], "--knn needs --dstore_dir"),
        (["--validation_file", "PAIRS", "--build_index", "--dstore_dir", "."], "holds no datastore of a t5 model"),
        (["--do_eval", "--validation_file", "PAIRS", "--num_beams", "0"], "--num_beams must be at least 1, got 0"),
        (["--do_eval", "--validation_file", "PAIRS", "--num_beam", "2"], "(did you mean '--num_beams'?)"),
        (["--do_eval", "--validation_file", "PAIRS", "--source_lang", "de"], "no text of --source_lang de; it has: en"),
        (["--do_eval", "--validation_file", "UNEVEN"], "has 1 lines, UNEVEN.ro 2; they must be translations"),
        (["--do_eval", "--validation_file", "text.txt"], "text.txt is not .jsonl"),
        (["--do_eval", "--validation_file", "EMPTY"], "has no pairs of sentences"),
        (["--do_eval", "--validation_file", "BAD"], "bad.jsonl:2: not JSON"),
        (["--do_eval", "--dataset_name", "wmt16"], "wmt16 is no local folder, and no data are downloaded"),
        (["--do_eval", "--dataset_name", "."], "should have validation.jsonl, or validation.en and validation.ro"),
        (["--do_eval", "--dataset_name", "saved"], "needs the package datasets"),
        (["--do_eval", "--validation_file", "PAIRS", "--forced_bos_token", "zz"], "zz is no token of"),
        (["--do_eval", "--validation_file", "PAIRS", "--model_name_or_path", "GPT2"], "gpt2 models have no encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_told_before_any_work(
    words: list[str], message: str, translation: Translation, pairs_folder: Path, tiny_gpt2: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, text in {
        "empty.jsonl": "\n", "text.txt": "a\n", "bad.jsonl": '{"source": "a", "target": "b"}\n{\n', "UNEVEN.en": "a\n",
        "UNEVEN.ro": "a\nb\n", "saved/dataset_dict.json": "{}",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    replaced = {
        "PAIRS": pairs_folder / "validation.jsonl", "EMPTY": "empty.jsonl", "BAD": "bad.jsonl", "GPT2": tiny_gpt2
    }  # fmt: skip
    given = [replaced.get(word, word) for word in words]
    given += ["--target_lang", "ro"] if "--source_lang" in words else []
    with pytest.raises(ValueError, match=re.escape(message)):
        translation(*given)
    assert not (tmp_path / "out").exists()


def test_more_positions_than_the_model_has_are_rejected(translation: Translation, pairs_folder: Path) -> None:
    words = ("--validation_file", pairs_folder / "validation.jsonl", "--do_eval")
    with pytest.raises(ValueError, match="--max_source_length 49 is more than the model's 48 positions"):
        translation(*words, "--max_source_length", "49", model="marian")
    assert "Evaluated" in translation(*words, "--max_source_length", "48", model="marian")


def test_every_argument_is_read(examples: Path) -> None:
    import translation_arguments

    read = names_read(examples)
    fields = {field.name for field in dataclasses.fields(translation_arguments.TranslationArguments)}
    assert fields - read == set()


def test_the_commands_of_the_readme_are_understood(examples: Path) -> None:
    from translation_arguments import parse

    words = readme_commands(examples, "run_translation.py", "t5-small")
    assert len(words) == 5
    for each in words:
        chosen, data, _, training = parse(each)
        assert (chosen.model_name_or_path, data.dataset_name) == ("t5-small", "wmt16")
        assert training.output_dir


def test_as_a_command_a_mistake_is_one_line_and_status_2(command: Command, pairs_folder: Path) -> None:
    words = ["--model_name_or_path", "none", "--do_eval", "--validation_file", pairs_folder / "validation.jsonl"]
    told = command("examples/huggingface/run_translation.py", *words, "--num_beams", "many", expect=2)
    message = "run_translation.py: error: argument --num_beams/--num-beams: invalid int value: 'many'"
    assert told.stderr.splitlines() == [message]
