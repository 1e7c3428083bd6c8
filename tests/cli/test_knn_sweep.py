"""--save-retrieval and fairseq-knn-sweep as their users see them; a sweep equals separate runs of eval_lm.py."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fairseq.memory.sources.external import ExternalMemory
from fairseq_cli import build_dstore, eval_lm, eval_lm_trime
from fairseq_cli.entry import run
from fairseq_cli.memory import knn_sweep

pytestmark = pytest.mark.slow

MAINS = {"eval_lm.py": eval_lm, "eval_lm-trime.py": eval_lm_trime, "fairseq-knn-sweep": knn_sweep}
EVAL = ("--cpu", "--max-tokens", "64", "--context-window", "16")
KNN = ("--knnlm", "--lmbda", "0.3", "--softmax-temp", "2")


@pytest.fixture(scope="module")
def store(trained: Path, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a datastore of the training text, and of an index over it."""
    prefix = tmp_path_factory.mktemp("store") / "d"
    saving = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", str(prefix)]
    eval_lm.main([str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *EVAL, *saving])
    index = ["--faiss_index", str(prefix), "--ncentroids", "8", "--code_size", "4"]
    build_dstore.main(["--dstore_mmap", str(prefix), *index])
    return prefix


@pytest.fixture
def evaluated(data_bin: Path, trained: Path, store: Path, tmp_path: Path):
    """Evaluate; returns the figures."""

    def call(*words: object, program: str = "eval_lm.py", subset: str = "valid") -> dict:
        fixed = (data_bin, "--path", trained / "checkpoint_best.pt", *EVAL, "--gen-subset", subset)
        out = ("--eval-file", tmp_path / "figures.json", "--dstore-filename", store)
        MAINS[program].main([str(word) for word in (*fixed, *out, *words)])
        return json.loads((tmp_path / "figures.json").read_text())

    return call


@pytest.fixture
def swept(capsys: pytest.CaptureFixture[str]):
    """Run fairseq-knn-sweep; returns what it printed."""

    def call(*words: object) -> str:
        capsys.readouterr()
        knn_sweep.main([str(word) for word in words])
        return capsys.readouterr().out

    return call


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; returns its one line."""

    def fails(program: str, *words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(program, MAINS[program].main, [str(word) for word in words])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(program)]
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return fails


@pytest.fixture(scope="module")
def kept(data_bin: Path, trained: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the saved neighbours valid.retrieval and test.retrieval."""
    folder = tmp_path_factory.mktemp("kept")
    for subset in ("valid", "test"):
        words = (data_bin, "--path", trained / "checkpoint_best.pt", *EVAL, "--gen-subset", subset, *KNN, "--k", 16)
        more = ("--dstore-filename", store, "--save-retrieval", folder / f"{subset}.retrieval")
        eval_lm.main([str(word) for word in (*words, *more)])
    return folder


@pytest.mark.parametrize("index", ["exact", "ivfpq", "ivfpq without keys"])
def test_a_sweep_equals_separate_runs(evaluated, swept, store, tmp_path, index):
    more = {"exact": (), "ivfpq": ("--indexfile", store, "--probe", 4)}
    more["ivfpq without keys"] = (*more["ivfpq"], "--no-load-keys")
    saved = evaluated(*KNN, "--k", 16, *more[index], "--save-retrieval", tmp_path / "r")
    grid = list(itertools.product((4, 16), (0.0, 0.35), (1.0, 5.0)))
    swept(tmp_path / "r", "--k", "4,16", "--lmbda", "0,0.35", "--temperature", "1,5", "--out", tmp_path / "s")
    found = json.loads((tmp_path / "s.json").read_text())["settings"]
    assert [(row["k"], row["lmbda"], row["softmax_temp"]) for row in found] == sorted(
        grid, key=lambda setting: (setting[0], setting[2], setting[1])
    )
    for row in found:
        words = ("--knnlm", "--k", row["k"], "--lmbda", row["lmbda"], "--softmax-temp", row["softmax_temp"])
        figures = evaluated(*words, *more[index])
        assert row["loss_base2"] == pytest.approx(figures["loss_base2"], abs=1e-6)
        assert row["num_counted"] == figures["num_counted"]
    swept(tmp_path / "r", "--lmbda", "0.3", "--out", tmp_path / "s")  # the saved temperature and number of neighbours
    assert json.loads((tmp_path / "s.json").read_text())["best"]["loss_base2"] == pytest.approx(saved["loss_base2"])


@pytest.mark.parametrize("text", [("--use-local",), ()])
def test_a_sweep_of_trime_equals_separate_runs(evaluated, swept, tmp_path, text):
    words = ("--use-external", "--use-interp", "--k", 16, *text)
    more = ("--softmax-temp", 2, "--lmbda", 0.2, "--save-retrieval", tmp_path / "r")
    evaluated(*words, *more, program="eval_lm-trime.py")
    temperatures = ("2",) if text else ("1", "2")
    grid = ("--k", "4,16", "--lmbda", "0,0.4", "--interp-temp", "3", "--temperature", ",".join(temperatures))
    swept(tmp_path / "r", *grid, "--out", tmp_path / "s")
    for row in json.loads((tmp_path / "s.json").read_text())["settings"]:
        alone = ("--use-external", *text, "--k", row["k"], "--softmax-temp", row["softmax_temp"])
        mixed = ("--use-interp", "--lmbda", row["lmbda"], "--interp-temp", row["interp_temp"]) if row["lmbda"] else ()
        figures = evaluated(*alone, *mixed, program="eval_lm-trime.py")
        assert row["loss_base2"] == pytest.approx(figures["loss_base2"], abs=1e-6)


@pytest.mark.parametrize("program", ["eval_lm.py", "eval_lm-trime.py"])
def test_a_killed_evaluation_goes_on(evaluated, tmp_path, monkeypatch, program, products):
    words = KNN if program == "eval_lm.py" else ("--use-external", "--use-local", "--softmax-temp", 2)
    words = (*words, "--k", 16, "--knn-bulk", 100)
    whole = evaluated(*words, "--save-retrieval", tmp_path / "whole", program=program)
    lookup, calls = ExternalMemory.lookup, []

    def dies(memory: ExternalMemory, query_ND: torch.Tensor):
        calls.append(len(query_ND))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lookup(memory, query_ND)

    with monkeypatch.context() as killed:
        killed.setattr(ExternalMemory, "lookup", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluated(*words, "--save-retrieval", tmp_path / "r", program=program)
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr(ExternalMemory, "lookup", dies)  # from its fourth call on it lives
    figures = evaluated(*words, "--save-retrieval", tmp_path / "r", program=program)
    assert sum(calls[3:]) == whole["num_tokens"] - sum(calls[:2])
    assert (tmp_path / "r").read_bytes() == (tmp_path / "whole").read_bytes()
    assert figures["loss_base2"] == whole["loss_base2"]
    calls.clear()
    again = evaluated(*words, "--save-retrieval", tmp_path / "r", program=program)  # all is there: nothing is searched
    assert again["loss_base2"] == pytest.approx(whole["loss_base2"], abs=1e-9)
    assert not calls


def test_results_and_warning(swept, kept, tmp_path, caplog):
    out = swept(kept / "valid.retrieval", "--temperature", "1,5", "--k", "4,16", "--out", tmp_path / "s")
    told = json.loads((tmp_path / "s.json").read_text())
    rows = told["settings"]
    best = min(rows, key=lambda row: row["loss_base2"])
    assert told["best"] == best
    assert "best, tuned on valid: --k " in out
    assert f"Loss (base 2): {best['loss_base2']:.4f}, Perplexity: {best['perplexity']:.2f}\n" in out
    assert "is taken on valid, the split the setting was chosen on" in caplog.text
    assert told["tuned_on_reported_text"]
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 19 * 2 * 2
    assert [float(row["perplexity"]) for row in table] == [row["perplexity"] for row in rows]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "s.run.json").read_text())["command"].startswith("fairseq-knn-sweep ")


def test_the_best_setting_is_reported_on_another_split(swept, evaluated, kept, tmp_path, caplog):
    more = ("--report", kept / "test.retrieval", "--out", tmp_path / "s")
    out = swept(kept / "valid.retrieval", "--temperature", "1,5", *more)
    told = json.loads((tmp_path / "s.json").read_text())
    best, reported = told["best"], told["reported"]
    words = ("--k", best["k"], "--lmbda", best["lmbda"], "--softmax-temp", best["softmax_temp"])
    assert reported["loss_base2"] == pytest.approx(evaluated("--knnlm", *words, subset="test")["loss_base2"], abs=1e-6)
    assert "reported on test" in out
    assert not told["tuned_on_reported_text"]
    assert "flatters" not in caplog.text
    swept(kept / "valid.retrieval", "--report", kept / "valid.retrieval", "--out", tmp_path / "s")
    assert "--report names the text that the setting was chosen on (valid)" in caplog.text


def test_shards_of_an_evaluation_are_swept_together(evaluated, swept, told, kept, tmp_path):
    for shard in range(2):
        more = ("--num-shards", 2, "--shard-id", shard, "--save-retrieval", tmp_path / f"r{shard}")
        evaluated(*KNN, "--k", 16, *more)
    grid = ("--lmbda", "0.3", "--k", "4", "--out", tmp_path / "s")
    best = []
    for files in ((tmp_path / "r0", tmp_path / "r1"), (kept / "valid.retrieval",)):
        swept(*files, *grid)
        best.append(json.loads((tmp_path / "s.json").read_text())["best"])
    assert best[0] == pytest.approx(best[1], abs=1e-5)
    line = told("fairseq-knn-sweep", tmp_path / "r1", *grid)
    assert "the files hold the shards 1 of 2" in line


def test_explained_tokens(swept, kept, tmp_path):
    out = swept(kept / "valid.retrieval", "--lmbda", "0.5", "--explain", 3, "--out", tmp_path / "s")
    told = json.loads((tmp_path / "s.json").read_text())
    assert len(told["gained"]) == len(told["lost"]) == 3
    gains = [change["gain"] for change in told["gained"]]
    assert gains == sorted(gains, reverse=True)
    assert all(change["gain"] < 0 for change in told["lost"])
    best = told["gained"][0]
    word = best["text"].split("[")[1].split("]")[0]
    assert any(n["is_hit"] and f"[{word}]" in n["text"] for n in best["neighbors"])
    assert 0 < sum(n["share"] for n in best["neighbors"]) <= 1 + 1e-6
    assert out.index("gained most:") < out.index("lost most:")
    assert f"{gains[0]:+.2f}" in out


def test_neighbours_are_shown_as_the_store_has_them(swept, kept, store, corpus, tmp_path):
    swept(kept / "valid.retrieval", "--lmbda", "0.5", "--explain", 2, "--out", tmp_path / "s")
    texts = {
        name: " ".join((corpus / f"{name}.txt").read_text().replace("\n", " </s> ").split())
        for name in ("train", "valid")
    }
    changes = json.loads((tmp_path / "s.json").read_text())
    for change in changes["gained"] + changes["lost"]:
        assert change["text"].replace("[", "").replace("]", "") in texts["valid"]
        for neighbor in change["neighbors"]:
            assert neighbor["text"].replace("[", "").replace("]", "") in texts["train"]


def test_without_matplotlib(swept, kept, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    swept(kept / "valid.retrieval", "--out", tmp_path / "s")
    assert "no heat map: matplotlib is not installed (pip install 'fairseq-memory[plot]')" in caplog.text
    assert (tmp_path / "s.csv").exists()
    assert not (tmp_path / "s.png").exists()


def test_mistakes_of_a_sweep(told, kept, store, data_bin, tmp_path):
    def line(*words: object) -> str:
        return told("fairseq-knn-sweep", *words)

    valid = kept / "valid.retrieval"
    assert "no file" in line(tmp_path / "r")
    assert "--k 17 is more than the 16 neighbours" in line(valid, "--k", "4,17")
    assert "--lmbda 1.5 is not in [0, 1]" in line(valid, "--lmbda", "1.5")
    assert "--temperature 0 is not positive" in line(valid, "--temperature", "0")
    assert "'0:1' is no number or range; write 0.25, a list 1,3,10 or FIRST:LAST:STEP" in line(valid, "--lmbda", "0:1")
    assert "is no file of --save-retrieval" in line(data_bin / "valid.bin")
    short = tmp_path / "short.retrieval"
    short.write_bytes(valid.read_bytes()[:-9])
    assert "it is truncated" in line(short)
    assert "no file" in line(valid, "--report", tmp_path / "r")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert "--out: " in line(valid, "--out", locked / "s")
    (tmp_path / "words.txt").write_text("a 1\n")
    assert "is not the one of" in line(valid, "--explain", 1, "--dictionary", tmp_path / "words.txt")
    assert "none does not exist; give --dictionary FILE" in line(
        valid, "--explain", 1, "--dictionary", tmp_path / "none"
    )
    told_about = json.loads(Path(f"{store}.json").read_text())
    for end in ("_keys.npy", "_vals.npy", "_docs.npy"):
        shutil.copy(f"{store}{end}", tmp_path / f"d{end}")
    told_about["checksums"]["values"][0] = "00000000"
    (tmp_path / "d.json").write_text(json.dumps(told_about))
    assert "is not the one" in line(valid, "--explain", 1, "--dstore-filename", tmp_path / "d")
    assert "no datastore at" in line(valid, "--explain", 1, "--dstore-filename", tmp_path / "gone")


def test_mistakes_of_saving(told, kept, data_bin, trained, store, tmp_path):
    def line(*words: object, program: str = "eval_lm.py") -> str:
        fixed = (data_bin, "--path", trained / "checkpoint_best.pt", *EVAL, "--gen-subset", "valid")
        return told(program, *fixed, *words)

    knn = (*KNN, "--dstore-filename", store, "--k", 8)
    assert "--save-retrieval keeps the neighbours that --knnlm finds: give it too" in line("--save-retrieval", "r")
    assert "--save-retrieval keeps the neighbours of the external memory: give --use-external too" in line(
        "--use-local", "--save-retrieval", "r", program="eval_lm-trime.py"
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert "accepts no new files" in line(*knn, "--save-retrieval", locked / "r")
    assert "is a folder; give the name of a file" in line(*knn, "--save-retrieval", tmp_path)
    cut = (*KNN, "--dstore-filename", store, "--k", 16, "--save-retrieval", kept / "valid.retrieval")
    assert "holds neighbours of another evaluation" in line(*cut, "--tokens-per-sample", 31)
    assert "k 16 and 8); give another name, or remove it" in line(*knn, "--save-retrieval", kept / "valid.retrieval")
