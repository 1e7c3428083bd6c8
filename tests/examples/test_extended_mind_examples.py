"""The programs under examples/extended_mind: sets, settings, scores, and whole runs with a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "extended_mind"
sys.path.insert(0, str(FOLDER))

building, experiments, planting, perplexity = (
    importlib.import_module(name)
    for name in ("build_counterfactual", "experiments", "planted_questions", "run_perplexity")
)

WORDS = "the a sea king of and ship river north old town was in by stone".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("articles") / "articles.txt"
    parts = []
    for number in range(4):
        sentences = (" ".join(WORDS[(number + i * j) % len(WORDS)] for j in range(9)) for i in range(30))
        parts.append(f" = Place {number} = \n \n " + " ".join(s.capitalize() + " ." for s in sentences) + " \n")
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    """A random Llama with a tokenizer of words of the articles."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=400, show_progress=False)
    own.train([str(text)], trainer)
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=own.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a program in this process; returns what it prints, or the message it stops with."""

    def running(script, *words, expect=0):
        monkeypatch.setattr(sys, "argv", [script])
        code = None
        try:
            importlib.import_module(script.removesuffix(".py")).main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert (1 if isinstance(code, str) else code or 0) == expect, (code, printed)
        return f"{code} {printed.err}" if expect else printed.out

    return running


def test_from_articles_to_a_table_of_accuracies(run, text, model, tmp_path):
    run("planted_questions.py", text, tmp_path / "questions.jsonl", 3, "100,200")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 15
    assert all(f"{row['stem']} {row['answer']}." in row["document"] for row in rows)
    base = tmp_path / "build.yaml"
    base.write_text(f"questions: {tmp_path}/questions.jsonl\nedits: {tmp_path}/edits.json\nsplits: [800, 3000]\n")
    run("build_counterfactual.py", "--base", base, f"tokenizer={model}", f"out={tmp_path}")
    made = {
        name: [json.loads(line) for line in (tmp_path / f"counterfactual_{name}.jsonl").read_text().splitlines()]
        for name in ("800", "3k")
    }
    assert sum(map(len, made.values())) == 15
    for row in made["800"] + made["3k"]:
        assert row["answer"] in row["document"]
        assert row["true_answer"] not in row["document"]
        assert row["appearances"] == 1
        others = [r["answer"] for r in rows if r["title"] == row["title"]]
        assert not any(other in row["document"] for other in others)
    config = FOLDER / "configs" / "retrieval-smollm2.yaml"
    words = [f"model={model}", f"data={tmp_path}", f"out={tmp_path}/out", "n_tokens=3", "limit=5"]
    printed = run("run_retrieval.py", "--base", config, *words)
    results = json.loads((tmp_path / "out" / "retrieval.json").read_text(encoding="utf-8"))["results"]
    modes = {line["mode"]: line["questions"] for line in results["accuracy"] if line["split"] == "all"}
    assert modes == dict.fromkeys(
        ["none", "memory", "relative", "document", "chunks", "relative+chunks"], modes["none"]
    )
    assert modes["none"] >= 5
    assert (tmp_path / "out" / "retrieval.png").stat().st_size > 1000
    # A second run has nothing left to ask.
    assert run("run_retrieval.py", "--base", config, *words) == printed
    wrong = run("run_retrieval.py", "--base", config, *words, "modes=[memories]", expect=1)
    assert "unknown mode 'memories'" in wrong


def test_perplexity_runs_and_goes_on(run, text, model, tmp_path):
    words = [f"model={model}", f"text={text}", f"out={tmp_path}", "memories.relative.topk=1000", "stride=16", "step=48"]
    more = ["input_lengths=[32,64,128]", "seq_len_trained=32", "min_tokens=200", "num_articles=2"]
    words = ["--base", FOLDER / "configs" / "perplexity-smollm2.yaml", *words, *more]
    printed = run("run_perplexity.py", *words)
    assert printed.count("tokens in reach: perplexity") == 3 * 3
    results = json.loads((tmp_path / "perplexity.json").read_text(encoding="utf-8"))["results"]
    assert [(row["title"], row["memory"]) for row in results["articles"]] == [
        (title, name) for title in ("Place 0", "Place 1") for name in ("relative", "origin", "reading")
    ]
    types = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    # A random model's guesses are as good as chance.
    by_memory = results["perplexity"]
    assert all(0.8 * types < value < 1.25 * types for each in by_memory.values() for value in each.values())
    # Who attends to all that stands before, in its place, reads it.
    assert by_memory["relative"] == pytest.approx(by_memory["reading"], rel=1e-5)
    assert by_memory["reading"]["128"] != pytest.approx(by_memory["origin"]["128"], rel=1e-5)
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    record = (tmp_path / "windows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "windows.jsonl").write_text(record[:-50], encoding="utf-8")  # killed in its last line
    assert run("run_perplexity.py", *words) == printed
    assert (tmp_path / "windows.jsonl").read_text(encoding="utf-8") == record


def test_timing_runs(run, text, model, tmp_path):
    words = [f"model={model}", f"text={text}", f"out={tmp_path}"]
    more = ["num_tokens=100", "n_queries=2", "n_tokens=2"]
    printed = run("run_timing.py", "--base", FOLDER / "configs" / "timing-smollm2.yaml", *words, *more)
    assert printed.count("all 2") == 2
    seconds = json.loads((tmp_path / "timing.json").read_text(encoding="utf-8"))["results"]["seconds"]
    assert all(0 < first < last for first, last in seconds.values())


def test_the_demo_asks_with_and_without_memory(run, model):
    printed = run("demo.py", model)
    assert [line.split(":")[0] for line in printed.splitlines()[:4]] == ["topk 0", "topk 2", "topk 5", "topk 10"]
    assert printed.count(" read '") == 3
    assert "usage: demo.py MODEL" in run("demo.py", expect=1)


def test_settings_are_merged_and_mistakes_told(run, tmp_path):
    script = "build_counterfactual.py"
    assert "give --base CONFIG.yaml" in run(script, expect=2)
    assert "no file 'missing.yaml'" in run(script, "--base", "missing.yaml", expect=2)
    (tmp_path / "a.yaml").write_text("questions: q\n")
    assert "'edits' is missing" in run(script, "--base", tmp_path / "a.yaml", expect=2)
    assert "neither --base" in run(script, "--bases", tmp_path / "a.yaml", expect=2)
    (tmp_path / "b.yaml").write_text("questions: [\n")
    assert "error: " in run(script, "--base", tmp_path / "b.yaml", expect=2)


def test_facts_are_edited_everywhere():
    assert building.edited("Ann saw ANN and Anna.", "Ann", "Bo") == ("Bo saw BO and Boa.".replace("BO", "Bo"), 3)
    rows = [{"document": "Ann met Cy.", "question": f"Who met {a}?", "answer": a} for a in ("Ann", "Cy", "Dee")]
    made = building.counterfactual(rows, {"Ann": "Bo", "Dee": "Eve"})
    assert [(r["document"], r["question"], r["answer"]) for r in made] == [("Bo met Cy.", "Who met Bo?", "Bo")]
    assert [building.split_of(n, [2000, 1000]) for n in (1000, 1001, 2001)] == ["1k", "2k", None]


def test_wikitext_becomes_ordinary_text():
    assert (
        planting.plain(" In 2 @,@ 000 the <unk> co @-@ star 's film ( 9 @.@ 5 m ) won . ")
        == "In 2,000 the co-star's film (9.5 m) won."
    )
    assert list(planting.articles(" = A = \n \n One . Two ! \n = = B = = \n Three . \n = C = \n Four . \n")) == [
        ("A", ["One.", "Two!", "Three."]),
        ("C", ["Four."]),
    ]


def test_scores():
    assert experiments.is_correct("Ann", "it was ANN.")
    assert experiments.is_correct(["Bo", "Ann"], "ann")
    assert not experiments.is_correct("Bo", "ann")
    # Wilson 1927, as tabulated for 8 of 10 (e.g. in R: prop.test without correction).
    assert experiments.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert experiments.wilson(0, 10)[0] == 0.0
    assert experiments.wilson(10, 10)[1] == 1.0
    assert experiments.wilson(0, 0) == (0.0, 1.0)


def test_every_token_after_the_first_window_is_scored_once():
    found = list(perplexity.windows(100, 32, 16))
    assert [token for _, scored, stop in found for token in range(scored, stop)] == list(range(16, 100))
    assert all(stop - start == 32 for start, _, stop in found)
    assert list(perplexity.windows(100, 32, 16, 40)) == [(0, 16, 32), (40, 56, 72), (68, 96, 100)]
