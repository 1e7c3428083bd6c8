import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.segments import read_segments
from fairseq.data.trime_batching import read_order
from fairseq_cli import train
from fairseq_cli.entry import run

ROOT = Path(__file__).resolve().parents[2]


def search_words(folder, *more):
    words = ("--index_path", folder / "index", "--segments_path", folder / "segments.json")
    return [str(word) for word in (*words, "--results_path", folder / "results", *more)]


def search(folder, *more):
    from fairseq_cli.data.bm25_search import main

    run("bm25_search.py", main, search_words(folder, *more))


def make_batches(folder, *more):
    from fairseq_cli.data.bm25_make_batches import main

    words = ["--results_path", str(folder / "results"), "--batch_file", str(folder / "batches.json"), *more]
    run("bm25_make_batches.py", main, words)


def found_in(folder):
    content = {}
    for path in sorted((folder / "results").glob("shard?.json")):
        content |= json.loads(path.read_text())
    return content


def write_topics(folder, count, num_topics=8, words=40):
    """Segments about one of a few topics each; returns the topics."""
    rng = np.random.default_rng(0)
    topics = rng.permutation(np.arange(count) % num_topics)
    texts = [" ".join(f"t{topic}w{i}" for i in rng.integers(0, 200, words)) for topic in topics]
    items = [{"id": str(i), "contents": text} for i, text in enumerate(texts)]
    (folder / "segments.json").write_text(json.dumps(items), encoding="utf-8")
    return topics


def test_from_text_to_batches_of_segments_that_are_alike(data_bin, tmp_path, capsys):
    path = tmp_path / "segments.json"
    train.main([str(data_bin), "--tokens-per-sample", "16", "--output-segments-to-file", str(path)])
    dictionary = Dictionary.load(data_bin / "dict.txt")
    tokens = np.asarray(MMapIndexedDataset(str(data_bin / "train")).tokens)
    texts = list(read_segments(path))
    assert texts == [dictionary.string(tokens[start : start + 16]) for start in range(0, len(tokens), 16)]
    search(tmp_path)
    make_batches(tmp_path)
    order = read_order(tmp_path / "batches.json", len(texts))
    shared = [len(set(texts[a].split()) & set(texts[b].split())) for a, b in zip(order, order[1:])]
    by_chance = [len(set(texts[a].split()) & set(texts[b].split())) for a, b in zip(order, np.roll(order, 50))]
    assert np.mean(shared) > 1.5 * np.mean(by_chance)
    report = json.loads((tmp_path / "batches.json.run.json").read_text())["figures"]
    assert report["neighbor_rate"] > 0.8 > 0.2 > report["neighbor_rate_of_a_shuffle"]
    printed = capsys.readouterr().out
    assert f"wrote {len(texts)} segments of at most 16 tokens" in printed
    assert f"{100 * report['neighbor_rate']:.1f}% of those next to each other are retrieved" in printed


def test_segments_of_two_folders_have_no_numbers(data_bin, tmp_path):
    with pytest.raises(ValueError, match="one data folder, 2 are given"):
        train.main([f"{data_bin}:{data_bin}", "--output-segments-to-file", str(tmp_path / "x")])


def test_shards_together_are_the_whole_search(tmp_path):
    topics = write_topics(tmp_path, 101)
    search(tmp_path, "--num_neighbors", "6")
    whole = found_in(tmp_path)
    assert list(whole) == [str(i) for i in range(101)]
    for segment, found in whole.items():
        assert len(found) == 6
        assert all(type(i) is int and i != int(segment) and topics[i] == topics[int(segment)] for i in found)
    (tmp_path / "results").rename(tmp_path / "whole")
    for shard in (2, 0, 1):
        search(tmp_path, "--num-shards", "3", "--shard-id", str(shard), "--num_neighbors", "6")
    assert len(list((tmp_path / "results").glob("shard?.json"))) == 3
    assert found_in(tmp_path) == whole


def test_more_shards_than_segments(tmp_path):
    write_topics(tmp_path, 2)
    for shard in range(3):
        search(tmp_path, "--num_shards", "3", "--shard_id", str(shard))
    make_batches(tmp_path)
    assert sorted(read_order(tmp_path / "batches.json", 2)) == [0, 1]


def test_a_finished_shard_is_not_searched_again(tmp_path, capsys):
    write_topics(tmp_path, 30)
    search(tmp_path)
    before = (tmp_path / "results" / "shard0.json").stat().st_mtime_ns
    search(tmp_path)
    assert "searched 0 of 30 segments" in capsys.readouterr().out
    assert (tmp_path / "results" / "shard0.json").stat().st_mtime_ns == before


def test_a_killed_search_goes_on(tmp_path, forks, command):
    write_topics(tmp_path, 3000, num_topics=150)
    words = ("bm25_search.py", *search_words(tmp_path))
    killed = forks.start(*words)
    partial = tmp_path / "results" / "shard0.partial"
    deadline = time.monotonic() + 60
    while killed.poll() is None and not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = partial.read_text().count("\n")
    assert 0 < done < 3000
    assert "resuming at segment " in command(*words).stderr
    resumed = (tmp_path / "results" / "shard0.json").read_bytes()
    (tmp_path / "results").rename(tmp_path / "resumed")
    search(tmp_path)
    assert (tmp_path / "results" / "shard0.json").read_bytes() == resumed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard_id", "1"], "--shard_id 1 is not below --num_shards 1"),
        (["--num_neighbors", "0"], "--num_neighbors must be at least 1, got 0"),
        (["--backend", "pyserini"], "holds no Lucene index; build one (python -m pyserini.index.lucene"),
        (["--segments_path", "missing.json"], "no such file: missing.json"),
        (["--num-shard", "2"], "unknown flag --num-shard (did you mean '--num_shards'?)"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, more, message):
    write_topics(tmp_path, 3)
    with pytest.raises(SystemExit) as stop:
        search(tmp_path, *more)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(said) == 1
    assert message in said[0]


def test_results_without_all_segments_make_no_batches(tmp_path, capsys):
    write_topics(tmp_path, 30)
    search(tmp_path, "--num_shards", "2", "--shard_id", "0")
    with pytest.raises(SystemExit):
        make_batches(tmp_path)
    assert "lacks 15 of 30 segments (15, 16, 17, ...)" in capsys.readouterr().err
    assert not (tmp_path / "batches.json").exists()


FAKE_PYSERINI = '''
import json, pathlib
CLAUSES = []
class Hit:
    def __init__(self, docid): self.docid = docid
class LuceneSearcher:
    """Ranks documents by shared words, as far as this test needs it."""
    def __init__(self, folder):
        segments = json.loads((pathlib.Path(folder).parent / "segments.json").read_text())
        self.words = [set(item["contents"].split()) for item in segments]
        self.num_docs = len(self.words)
    def batch_search(self, queries, qids, k, threads):
        assert CLAUSES == [1 << 20]
        found = {}
        for query, qid in zip(queries, qids):
            shared = [len(set(query.split()) & words) for words in self.words]
            best = sorted(range(len(shared)), key=lambda d: (-shared[d], d))[:k]
            found[qid] = [Hit(str(d)) for d in best if shared[d]]
        return found
'''


@pytest.fixture
def fake_pyserini(tmp_path, monkeypatch):
    package = tmp_path / "site" / "pyserini" / "search"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "lucene.py").write_text(FAKE_PYSERINI)
    (tmp_path / "site" / "jnius.py").write_text(
        "class Searcher:\n    def setMaxClauseCount(count):\n"
        "        from pyserini.search.lucene import CLAUSES\n        CLAUSES.append(count)\n"
        "def autoclass(name):\n    assert name == 'org.apache.lucene.search.IndexSearcher'\n    return Searcher\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("pyserini", "jnius")]:
        del sys.modules[name]


def lucene_index(folder):
    (folder / "index").mkdir()
    (folder / "index" / "segments_1").touch()


def test_a_lucene_index_is_searched_with_pyserini(tmp_path, fake_pyserini):
    topics = write_topics(tmp_path, 70)
    lucene_index(tmp_path)
    search(tmp_path, "--num_neighbors", "4")
    for segment, found in found_in(tmp_path).items():
        assert len(found) == 4
        assert all(i != int(segment) and topics[i] == topics[int(segment)] for i in found)
    assert json.loads((tmp_path / "results" / "search.json").read_text())["backend"] == "pyserini"


def test_a_lucene_index_of_other_segments_is_told(tmp_path, fake_pyserini, monkeypatch, capsys):
    write_topics(tmp_path, 70)
    lucene_index(tmp_path)
    monkeypatch.setattr("pyserini.search.lucene.LuceneSearcher.num_docs", 71, raising=False)
    (tmp_path / "index").rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "other" / "index")
    write_topics(tmp_path / "other", 71)
    with pytest.raises(SystemExit):
        search(tmp_path, "--index_path", str(tmp_path / "other" / "index"))
    assert "holds 71 documents" in capsys.readouterr().err


def test_a_lucene_index_without_pyserini_or_with_bm25s_is_told(tmp_path, monkeypatch, capsys):
    write_topics(tmp_path, 5)
    lucene_index(tmp_path)
    monkeypatch.setitem(sys.modules, "pyserini", None)
    with pytest.raises(SystemExit):
        search(tmp_path)
    assert "pip install 'fairseq-memory[pyserini]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search(tmp_path, "--backend", "bm25s")
    assert "is a Lucene index; drop --backend bm25s" in capsys.readouterr().err
