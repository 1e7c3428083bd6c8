"""eval_lm.py --save-knnlm-dstore in parts: what is saved is what one process saves, to the last bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.merge import merge
from fairseq_cli import eval_lm


@pytest.fixture
def save(data_bin: Path, trained: Path):
    """Save a store of the validation text: prefix, then flags."""

    def run(prefix: Path, *words: object) -> None:
        base = [data_bin, "--path", trained / "checkpoint_best.pt", "--cpu", "--gen-subset", "valid"]
        eval_lm.main([str(word) for word in (*base, "--save-knnlm-dstore", "--dstore-mmap", prefix, *words)])

    return run


@pytest.mark.parametrize("seed", range(8))
def test_parts_hold_the_rows_of_a_store_that_one_process_saves(save, tmp_path, seed):
    draw = random.Random(seed)
    context = draw.choice([0, 5, 16, 24])
    words = ["--context-window", context, "--tokens-per-sample", draw.choice([8, context + 8, 32])]
    words += ["--sample-break-mode", draw.choice(["none", "complete", "eos"])]
    words += draw.choice([["--max-sentences", draw.randint(1, 4)], ["--max-tokens", draw.randint(40, 200)]])
    words += draw.choice([[], ["--dstore-fp16"], ["--dstore-bf16"]])
    save(tmp_path / "whole", *words)
    count = draw.randint(2, 7)
    for shard in draw.sample(range(count), count):
        assert not (tmp_path / "parts.json").exists()
        save(tmp_path / "parts", *words, "--num-shards", count, "--shard-id", shard)
    whole, parts = Datastore.open(tmp_path / "whole"), Datastore.open(tmp_path / "parts")
    assert len(parts.shards) == count
    assert sum(part.rows for part in parts.shards) == len(whole)
    assert all(part.rows for part in parts.shards)
    for array in ("keys", "values"):
        one, two = (np.concatenate(getattr(store, array).chunks) for store in (whole, parts))
        assert one.tobytes() == two.tobytes()
    every = np.arange(len(whole))
    np.testing.assert_array_equal(whole.where(every), parts.where(every))
    parts.verify()
    for name in ("key_tap", "model_digest", "dictionary_digest", "text_digest", "context_window", "num_documents"):
        assert parts.metadata[name] == whole.metadata[name]


def documents_of(data_bin: Path, mode: str, size: int) -> list[list[int]]:
    """The oracle: the validation text as lists of tokens, one per document."""
    text = MMapIndexedDataset(str(data_bin / "valid"))
    edges = np.cumsum([0, *text.sizes])
    lines = [text.tokens[a:b].tolist() for a, b in zip(edges, edges[1:])]
    if mode == "none":
        return [sum(lines, [])]
    if mode == "eos":
        return lines
    documents: list[list[int]] = [[]]
    for line in lines:
        if mode == "complete_doc":
            if len(line) == 1:
                documents.append([])
            else:
                documents[-1] += line
        else:
            if documents[-1] and len(documents[-1]) + len(line) > size:
                documents.append([])
            documents[-1] += line
    return [document for document in documents if document]


@pytest.mark.parametrize("context", [0, 24])
@pytest.mark.parametrize("mode", ["none", "eos", "complete", "complete_doc"])
def test_a_row_is_found_in_its_document(save, data_bin, tmp_path, mode, context):
    words = ["--sample-break-mode", mode, "--context-window", context, "--tokens-per-sample", 8, "--max-sentences", 3]
    for shard in range(2):
        save(tmp_path / "s", *words, "--score-all", "--num-shards", 2, "--shard-id", shard)
    store = Datastore.open(tmp_path / "s")
    documents = documents_of(data_bin, mode, 8)
    assert store.metadata["num_documents"] == len(documents)
    tokens = np.asarray(store.values)
    document_N, offset_N = store.where(np.arange(len(store)))
    assert [documents[d][o] for d, o in zip(document_N, offset_N)] == tokens.tolist()
    assert sum(map(len, documents)) == len(store) + context
    ids = np.array([0, len(store) - 1, 5, 5, -1, *range(20, 60)])
    shown = store.context(ids, before=3, after=2)
    assert shown.shape == (len(ids), 6)
    first = {(int(d), int(o)) for d, o in zip(document_N, offset_N)}
    for row, line in zip(ids, shown.tolist()):
        d, o = (int(document_N[row]), int(offset_N[row])) if row >= 0 else (-1, -1)
        assert line == [documents[d][o + step] if (d, o + step) in first else -1 for step in range(-3, 3)]


def test_a_shard_that_is_saved_is_not_saved_again(save, tmp_path, capsys):
    words = ["--max-tokens", 64, "--context-window", 16, "--num-shards", 2]
    for _ in range(2):
        save(tmp_path / "d", *words, "--shard-id", 1)
    assert "d.part1-of-2 is complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of its 2 shards 0 are not saved"):
        Datastore.open(tmp_path / "d")
    save(tmp_path / "d", *words, "--shard-id", 0)
    assert "keys in 2 parts" in capsys.readouterr().out
    rows = len(Datastore.open(tmp_path / "d"))
    save(tmp_path / "d", *words, "--shard-id", 0, "--score-while-saving")  # another command, the same rows
    assert len(Datastore.open(tmp_path / "d")) == rows


def test_a_complete_store_of_other_things_stays(save, tmp_path, capsys, monkeypatch):
    save(tmp_path / "d", "--max-tokens", 64)
    before = (tmp_path / "d_keys.npy").read_bytes()
    capsys.readouterr()
    save(tmp_path / "d", "--max-tokens", 64)
    assert capsys.readouterr().out == f"{tmp_path}/d is complete already; --overwrite-dstore saves it again\n"
    with monkeypatch.context() as patch:
        patch.setattr("fairseq.evaluation.setup.load_checkpoint", None)  # both are named before a model is loaded
        for words, message in (
            (("--gen-subset", "test"), "its split is 'valid', that of this command is 'test'; name another place, or"),
            (("--dstore-fp16",), "its type of keys is 'float32', that of this command is 'float16'"),
        ):
            with pytest.raises(ValueError, match=message):
                save(tmp_path / "d", "--max-tokens", 64, *words)
    with pytest.raises(ValueError, match="its cut of the text into batches is"):
        save(tmp_path / "d", "--max-tokens", 128)
    with pytest.raises(ValueError, match="its use of --add-bos-token is False, that of this command is True"):
        save(tmp_path / "d", "--max-tokens", 64, "--add-bos-token")
    assert (tmp_path / "d_keys.npy").read_bytes() == before
    with open(tmp_path / "d_keys.npy", "r+b") as file:
        file.truncate(8)
    save(tmp_path / "d", "--max-tokens", 64)  # the same one, whose keys were cut short
    assert (tmp_path / "d_keys.npy").read_bytes() == before
    save(tmp_path / "d", "--max-tokens", 64, "--gen-subset", "test", "--overwrite-dstore")
    assert Datastore.open(tmp_path / "d").metadata["subset"] == "test"


def test_parts_of_different_commands_make_no_store(save, tmp_path, caplog):
    words = ["--max-tokens", 64, "--num-shards", 2]
    for shard in range(2):
        save(tmp_path / "d", *words, "--shard-id", shard)
    whole = (tmp_path / "d.json").read_bytes()
    other = ["--knn-keytype", "model_output"]
    with pytest.raises(ValueError, match="complete and its kind of keys is 'last_ffn_input', .* is 'model_output'"):
        save(tmp_path / "d", *words, "--shard-id", 0, *other)
    save(tmp_path / "d", *words, "--shard-id", 0, *other, "--overwrite-dstore")
    told = "key_tap is 'model_output' in the first and 'last_ffn_input' in the second"
    assert told in caplog.text
    assert (tmp_path / "d.json").read_bytes() == whole
    with pytest.raises(
        ValueError, match=r"d.part0-of-2' holds \d+ rows other than .* run fairseq-datastore merge again"
    ):
        Datastore.open(tmp_path / "d")
    with pytest.raises(ValueError, match=told):
        merge(tmp_path / "d")
    save(tmp_path / "d", *words, "--shard-id", 1, *other, "--overwrite-dstore")
    assert Datastore.open(tmp_path / "d").metadata["key_tap"] == "model_output"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-shards", "500", "--shard-id", "3"), r"--num-shards 500 is too many: valid makes \d+ batches to share"),
        (("--num-shards", "2", "--dstore-size", "7"), r"--dstore-size 7 does not fit: \d+ scored tokens less"),
        (("--dstore-fp16", "--dstore-bf16"), "--dstore-fp16 and --dstore-bf16 exclude each other"),
    ],
)
def test_impossible_shards(save, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "d", "--max-tokens", 64, "--context-window", 16, *words)
    assert not list(tmp_path.iterdir())


def test_processes_of_torchrun_are_shards(save, tmp_path, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        save(tmp_path / "d", "--max-tokens", 64)
    assert len(Datastore.open(tmp_path / "d").shards) == 2
    with pytest.raises(ValueError, match="torchrun makes a shard of each of its 2 processes; leave out"):
        save(tmp_path / "d", "--max-tokens", 64, "--num-shards", 2)


def test_a_folder_of_shards_is_saved_searched_and_recorded(save, data_bin, trained, tmp_path, capsys):
    folder = f"{tmp_path}/d/"
    words = ["--max-tokens", 64, "--context-window", 16, "--num-shards", 2]
    save(folder, *words, "--shard-id", 0)
    with pytest.raises(ValueError, match="of its 2 shards 1 are not saved"):
        Datastore.open(folder)
    save(folder, *words, "--shard-id", 1)
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert {"datastore.json", "datastore.run.json", "datastore.part1-of-2.run.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    base = [data_bin, "--path", trained / "checkpoint_best.pt", "--cpu", "--gen-subset", "valid", "--max-tokens", 64]
    base += ["--knnlm", "--dstore-filename", folder, "--k", 4, "--eval-file", tmp_path / "e.json"]
    eval_lm.main([str(word) for word in base])
    inputs = json.loads((tmp_path / "e.json.run.json").read_text())["inputs"]
    read = {Path(name).name for name in inputs if name.startswith(folder)}
    ends = ("_keys.npy", "_vals.npy", "_docs.npy", ".json")
    assert read == {"datastore.json", *(f"datastore.part{shard}-of-2{end}" for shard in range(2) for end in ends)}


def test_files_of_other_programs_stop_saving_before_it_begins(save, tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq.evaluation.setup.open_evaluation", None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "keys.npy").write_bytes(b"theirs")
    for words in ([], ["--num-shards", 2, "--shard-id", 0]):
        with pytest.raises(ValueError, match="keys.npy would be overwritten"):
            save(f"{tmp_path}/d/", *words)
    with pytest.raises(ValueError, match="'/' is no name of a datastore"):
        save("/")
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"keys.npy"}
