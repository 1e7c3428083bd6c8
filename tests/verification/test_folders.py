"""fairseq-datastore verify on folders and on files of theirs: everything in them is compared, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.merge import join_shards, merge
from fairseq.verification.recognition import contents, recognised
from fairseq_cli.datastore import PROGRAM, main
from fairseq_cli.entry import run
from tests.helpers import store_making
from tests.verification import test_flips as making


def flip(path: Path, place: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A folder with a folder store, and one of each other kind."""
    folder = tmp_path / "all"
    folder.mkdir()
    store_making.save(f"{folder}/", 50, documents=(20, 30))
    delete(f"{folder}/", np.array([3]))
    for make in (making.make_index, making.make_clusters, making.make_neighbors, making.make_memory):
        make(folder)
    making.make_text(folder)
    making.make_checkpoint(folder)
    store_making.save(folder / "plain", 40)
    (folder / "dict.txt").write_text("a 3\nb 2\n")
    (folder / "p.run.json").write_text('{"command": "train.py"}')
    (folder / "notes.txt").write_text("mine")
    return folder


def test_every_kind_in_a_folder_is_verified(everything, capsys):
    main(["verify", str(everything)])
    lines = [line.removeprefix(str(everything)).split(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == [
        "/: datastore",
        "/c.npz: clusters",
        "/dict.txt: dictionary",
        "/m.safetensors: memory",
        "/p.pt: checkpoint",
        "/p.run.json: run manifest",
        "/plain: datastore",
        "/r: saved neighbours",
        "/t: binarised text",
        "/x.l2: index",
        ": not compared",
    ]


DAMAGED = ["keys.npy", "vals.npy", "docs.npy", "deleted.npy", "datastore.json", "plain_vals.npy", "x.l2", "c.npz"]


@pytest.mark.parametrize("name", [*DAMAGED, "r", "t.bin", "t.sums.json", "p.pt"])
def test_damage_of_any_file_in_a_folder_is_found_and_named_once(everything, capsys, name):
    place = {"x.l2": 900, "c.npz": 900, "p.pt": 900, "datastore.json": 60, "t.sums.json": -12}.get(name, -2)
    flip(everything / name, place)
    with pytest.raises((ValueError, OSError), match=name) as raised:
        main(["verify", str(everything)])
    assert str(raised.value) not in capsys.readouterr().out


def test_damage_of_the_json_file_of_a_folder_store_is_found(tmp_path):
    store_making.save(f"{tmp_path}/d/", 5)
    path = tmp_path / "d" / "datastore.json"
    path.write_text(path.read_text().replace("last_ffn_input", "last_ffn_inpux"))
    for name in ("d", "d/datastore.json", "d/keys.npy", "d/datastore"):
        with pytest.raises(ValueError, match=r"datastore\.json is damaged: it differs from its own checksum"):
            main(["verify", f"{tmp_path}/{name}"])


def test_a_folder_and_a_store_of_one_name_are_both_verified(tmp_path, capsys):
    store_making.save(tmp_path / "d", 4)
    store_making.save(f"{tmp_path}/d/", 5)
    main(["verify", f"{tmp_path}/d"])
    lines = [line.removeprefix(str(tmp_path)) for line in capsys.readouterr().out.splitlines()]
    assert [line.split(" in")[0] for line in lines] == ["/d: datastore, 4 rows", "/d/: datastore, 5 rows"]
    main(["verify", f"{tmp_path}/d/"])
    assert "5 rows" in capsys.readouterr().out


def test_a_block_of_a_shard_is_reported_once(tmp_path, capsys):
    store_making.save(tmp_path / "a", 4)
    store_making.save(tmp_path / "b", 4)
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    assert [name.name for _, name in contents(tmp_path).found] == ["ab"]
    flip(tmp_path / "a_keys.npy")
    with pytest.raises(SystemExit):
        run(PROGRAM, main, ["verify", str(tmp_path)])
    said = capsys.readouterr()
    assert (said.out + said.err).count("a_keys.npy: the block") == 1
    assert join_shards(tmp_path / "none", 2) is None


def test_results_of_bm25_are_recognised_by_their_content(tmp_path):
    (tmp_path / "shard0.json").write_text('{"rows": 3}')
    (tmp_path / "about.json").write_text('{"author": "somebody"}')
    assert contents(tmp_path).found == []
    (tmp_path / "shard0.json").write_text('{\n"0": [1],\n"1": [0]\n}\n')
    assert recognised(tmp_path) == [("bm25 results", tmp_path)]


def test_files_of_other_programs_are_passed_over(tmp_path, capsys):
    for name in ("pytorch_model.bin", "README", "config.json", "data.zip", "keys.npy"):
        (tmp_path / name).write_text("{}")
    making.make_checkpoint(tmp_path)
    shutil.copy(tmp_path / "p.pt", tmp_path / "data.zip")
    main(["verify", str(tmp_path)])
    assert "README, config.json, data.zip, keys.npy, pytorch_model.bin" in capsys.readouterr().out


def test_a_store_of_another_program_is_verified_beside_other_files(tmp_path, capsys):
    (tmp_path / "dict.txt").write_text("a 3\n")
    np.ones((5, 4), np.float32).tofile(tmp_path / "keys.npy")
    np.arange(5).tofile(tmp_path / "vals.npy")
    main(["verify", str(tmp_path), "--dimension", "4"])
    said = capsys.readouterr().out
    assert "dict.txt: dictionary" in said
    assert "5 rows in 1 parts, 120 bytes: without checksums" in said


def test_a_changed_format_is_damage_of_saved_neighbours(tmp_path):
    making.make_neighbors(tmp_path)
    data = (tmp_path / "r").read_bytes().replace(b"fairseq-memory retrieval", b"fairseq-memori retrieval")
    (tmp_path / "r").unlink()
    (tmp_path / "r").write_bytes(data)
    assert recognised(tmp_path / "r") == [("saved neighbours", tmp_path / "r")]
    with pytest.raises(ValueError, match="is no file of --save-retrieval: another kind of file, or damaged"):
        main(["verify", str(tmp_path / "r")])


def test_the_checksums_are_blamed_for_their_own_damage(tmp_path):
    making.make_text(tmp_path)
    sums = json.loads((tmp_path / "t.sums.json").read_text())
    sums["files"][".bin"]["blocks"][0] = "0" * 8
    (tmp_path / "t.sums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=r"t\.sums\.json is damaged: it differs from its own checksum"):
        main(["verify", str(tmp_path / "t")])


def test_an_unfinished_store_is_not_passed_over(tmp_path):
    (tmp_path / "datastore.progress.json").write_text("{}")
    (tmp_path / "vals.npy.tmp").touch()
    with pytest.raises(ValueError, match="progress.json is damaged"):
        main(["verify", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/null", "is neither a file nor a folder; name a datastore"),
        ("{folder}", "is an empty folder; name a datastore"),
        ("{folder}/nothing", "no datastore at"),
    ],
)
def test_what_is_nothing_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        main(["verify", name.format(folder=tmp_path)])
