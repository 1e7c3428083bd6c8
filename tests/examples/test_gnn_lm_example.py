"""The programs of examples/gnn_lm on stores and figures made up here."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn.neighbors import SplitNeighbors, search_split
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "gnn_lm"
K = 4


def program(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py"), run_name=f"gnn_lm_{name}"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stores of three splits with their neighbours, and the dictionary."""
    folder = tmp_path_factory.mktemp("stores")
    dictionary = Dictionary()
    for number in range(12):
        dictionary.add_symbol(f"w{number}", 12 - number)
    dictionary.save(folder / "dict.txt")
    for seed, (split, rows) in enumerate((("train", 90), ("valid", 20), ("test", 30))):
        rng = np.random.default_rng(seed)
        keys = torch.from_numpy(rng.standard_normal((rows, 8)).astype(np.float32))
        values = torch.from_numpy(rng.integers(4, 16, rows))
        values[9::10] = dictionary.eos()
        facts = {"dictionary_digest": dictionary.digest(), "dictionary_size": len(dictionary)}
        with DatastoreWriter(folder / split, rows, 8, metadata=facts) as writer:
            writer.append(keys, values)
            writer.finish()
        search_split(
            NeighborsConfig(queries=str(folder / split), dstore_filename=str(folder / "train"), num_neighbors=K, band=6)
        )
    return folder, folder / "dict.txt"


def test_the_text_is_the_first_lines_and_its_halves(tmp_path: Path) -> None:
    lines = [f"w{i} " * (i % 4 + 1) for i in range(20)]
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    program("text").main([str(tmp_path), str(out), "--train-tokens", "30", "--eval-tokens", "9"])
    train = (out / "train.txt").read_text().splitlines()
    assert train == lines[:9]  # 2 + 3 + 4 + 5 twice, and 2
    assert sum(len(line.split()) + 1 for line in train) == 30
    assert (out / "valid.txt").read_text().splitlines() == lines[:3]
    halves = [(out / f"{name}.txt").read_text().splitlines() for name in ("first", "second")]
    assert halves == [train[:4], train[4:]]


def test_a_folder_without_one_text_for_each_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"one text of valid, valid\.txt or NAME\.valid\.tokens; it has no such file"):
        program("text").main([str(tmp_path), str(tmp_path / "out")])
    (tmp_path / "a.train.tokens").write_text("a\n")
    with pytest.raises(ValueError, match=r"it has train\.txt, a\.train\.tokens"):
        program("text").main([str(tmp_path), str(tmp_path / "out")])


def test_shuffled_neighbours_are_the_same_ones_of_other_tokens(stores: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "shuffled"
    for _ in range(2):  # started again, it leaves what is there
        program("shuffle").main([str(stores[0]), str(out), "--seed", "3"])
    train = Datastore.open(str(out / "train"))
    for split in ("train", "valid", "test"):
        true, other = (SplitNeighbors.open(folder / f"{split}.neighbors", train=train) for folder in (stores[0], out))
        rows = [np.asarray(neighbors.rows.block(0, len(neighbors))) for neighbors in (true, other)]
        assert sorted(map(tuple, rows[0])) == sorted(map(tuple, rows[1]))
        assert (rows[0] != rows[1]).any(1).mean() > 0.8
        assert true.digest != other.digest
        assert other.made_of.get("band") == true.made_of.get("band")


def test_the_view_shows_the_neighbours_by_rank_in_their_text(
    stores: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = stores
    program("view").main(
        [str(folder), str(words), "--first", "13", "--ranks", "3", "--window", "2", "--out", str(tmp_path / "shown")]
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "shown").read_text() == printed
    dictionary = Dictionary.load(words)
    queries, train = (Datastore.open(str(folder / split)) for split in ("test", "train"))
    query_ND, key_ND = (store.keys.block(0, len(store)).double().numpy() for store in (queries, train))
    cosine = (query_ND @ key_ND.T) / np.outer(np.linalg.norm(query_ND, axis=1), np.linalg.norm(key_ND, axis=1))
    tokens = re.findall(r"^token (\d+):.*\[(\S+)\]", printed, re.MULTILINE)
    assert [int(row) for row, _ in tokens] == list(range(13, 20))  # the line ends at 19
    assert tokens[-1][1] == "</s>"
    shown = re.findall(r"^  ([* ]) (\d) (-?[0-9.]+) train (\d+): (.*)$", printed, re.MULTILINE)
    assert len(shown) == 3 * len(tokens)
    values = train.values.take(torch.arange(len(train))).tolist()
    for number, (star, rank, similarity, place, text) in enumerate(shown):
        row, at = 13 + number // 3, int(place)
        assert at == np.argsort(-cosine[row])[int(rank) - 1]
        assert float(similarity) == pytest.approx(cosine[row, at], abs=6e-4)
        assert f"[{dictionary[values[at]]}]" in text
        assert (star == "*") == (dictionary[values[at]] == tokens[number // 3][1])
        window = text.partition("| ")[2].partition(" |")[0].split()
        inside = [dictionary[values[i]] for i in range(max(0, at - 2), min(len(values), at + 3))]
        assert [word.strip("[]") for word in window] == inside or at in (0, 1, len(values) - 1, len(values) - 2)


def test_a_token_beyond_the_split_is_an_error(stores: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="--first 30 is beyond the 30 tokens of test"):
        program("view").main([*map(str, stores), "--first", "30"])


def test_words_have_the_vectors_by_which_the_softmax_tells_them_apart() -> None:
    torch.manual_seed(0)
    ends = (6, 11, 16)
    bands = AdaptiveInput(16, 1, 8, 2, 8, ends)
    softmax = AdaptiveSoftmax(16, 8, ends, factor=2, adaptive_input=bands)
    weights = {f"decoder.adaptive_softmax.{name}": value for name, value in softmax.state_dict().items()}
    x_ND = torch.randn(5, 8)
    score_NV = x_ND @ program("words").output_vectors(weights).T
    logp_NV = softmax.vocab_logp(x_ND)
    for low, high in ((0, 6), (6, 11), (11, 16)):
        ours, theirs = (scores[:, low:high] - scores[:, low : low + 1] for scores in (score_NV, logp_NV))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no adaptive softmax that is tied"):
        program("words").output_vectors({})


def write_figures(folder: Path, lm: float, gnn: float, knn: float, both: float) -> None:
    """What run.sh leaves: perplexities on test, and 10 more on valid."""
    folder.mkdir()
    places = [{"first": 0, "last": 0, "perplexity": 99.0}, {"first": 1, "last": 3, "perplexity": 90.0}]
    for name, value in (("lm", lm), ("gnn", gnn)):
        for split, more in (("valid", 10.0), ("test", 0.0)):
            told: dict[str, Any] = {"perplexity": value + more, "positions": places}
            (folder / f"{name}.{split}.json").write_text(json.dumps(told))
    for name, value in (("knn", knn), ("gnn-knn", both)):
        best = {"k": 64, "lmbda": 0.2, "softmax_temp": 0.05, "perplexity": value + 10}
        (folder / f"{name}.json").write_text(json.dumps({"best": best, "reported": {"perplexity": value}}))
    (folder / "gnn-k2.valid.json").write_text(json.dumps({"perplexity": 105.0}))
    (folder / "lm.valid.seconds").write_text("7\n")


def test_the_report_compares_each_line_with_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report, folders = program("report"), [tmp_path / "1", tmp_path / "2"]
    write_figures(folders[0], lm=100.0, gnn=90.0, knn=95.0, both=89.0)
    write_figures(folders[1], lm=104.0, gnn=105.0, knn=95.0, both=95.0)
    for folder in folders:
        report.main([str(folder)])
        assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| GNN-LM | 100.00 | 90.00 | -10.0 %, language model |" in printed
    assert "GNN-LM + kNN, the language model's keys, chosen on valid: k 64, lmbda 0.2, softmax_temp 0.05" in printed
    assert "| valid | 110.00 | 105.00 |" in printed
    report.main([str(folder) for folder in folders])
    printed = capsys.readouterr().out
    assert "| kNN-LM | 105.00 (105.00 to 105.00) | 95.00 (95.00 to 95.00) | language model: 2 of 2 |" in printed
    assert "| GNN-LM | 107.50 (100.00 to 115.00) | 97.50 (90.00 to 105.00) | language model: 1 of 2 |" in printed
    assert "| 92.00 (89.00 to 95.00) | kNN-LM: 2 of 2 |" in printed


def test_a_folder_without_figures_is_an_error(tmp_path: Path) -> None:
    report = program("report")
    with pytest.raises(ValueError, match=r"run examples/gnn_lm/run\.sh"):
        report.main([str(tmp_path)])
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        report.main([str(tmp_path), str(tmp_path)])
