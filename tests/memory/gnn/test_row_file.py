import json

import numpy as np
import pytest
from dying import dies_at_event

from fairseq.memory.gnn.row_file import RowFile, RowWriter, existing, require_ours

ROWS = np.random.default_rng(0).integers(0, 256, (50, 6)).astype(np.uint8)
MADE_OF = {"kind": "codes", "store": "abc"}


def write(path, stop=50, made_of=MADE_OF, rows=ROWS, finish=True):
    with RowWriter(path, len(rows), rows.shape[1], str(rows.dtype), made_of) as writer:
        while writer.rows_done < stop:
            writer.append(rows[writer.rows_done : min(writer.rows_done + 7, stop)])
            writer.checkpoint()
        if finish and stop == len(rows):
            writer.finish()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_rows_come_back(dtype, tmp_path):
    write(tmp_path / "a.npy", rows=ROWS.astype(dtype))
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS.astype(dtype))
    opened = RowFile.open(tmp_path / "a.npy")
    assert np.array_equal(opened.rows.take(np.array([49, 0, 7])).numpy(), ROWS[[49, 0, 7]])
    assert opened.made_of == MADE_OF
    opened.verify()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.npy.json"}


def test_a_killed_writer_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    write(tmp_path / "whole.npy")
    wanted = (tmp_path / "whole.npy").read_bytes(), (tmp_path / "whole.npy.json").read_text()
    events = 0
    while True:
        path = tmp_path / f"killed{events}.npy"
        try:
            with dies_at_event(monkeypatch, events):
                write(path)
        except pytest.fail.Exception:  # it ended before so many events
            break
        if not path.with_name(path.name + ".json").exists():
            with pytest.raises(ValueError, match="is not complete; run the command that writes it again|is not there"):
                RowFile.open(path)
        write(path)
        assert (path.read_bytes(), path.with_name(path.name + ".json").read_text()) == wanted
        events += 1
    assert events > 9  # eight checkpoints and the renames at the end


def test_rows_after_the_last_checkpoint_are_written_again(tmp_path):
    with RowWriter(tmp_path / "a.npy", 50, 6, "uint8", MADE_OF) as writer:
        writer.append(ROWS[:20])
        writer.checkpoint()
        writer.append(ROWS[30:40])
    with RowWriter(tmp_path / "a.npy", 50, 6, "uint8", MADE_OF) as writer:
        assert writer.rows_done == 20
    write(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS)


def test_another_commands_unfinished_rows_are_kept(tmp_path):
    write(tmp_path / "a.npy", stop=14)
    with pytest.raises(
        ValueError, match="a.npy.progress.json is of 14 rows .* its store is 'abc', that of this command is 'x'"
    ):
        write(tmp_path / "a.npy", made_of=MADE_OF | {"store": "x"})
    with pytest.raises(ValueError, match="its width is 6, that of this command is 3; give another name, or remove it"):
        write(tmp_path / "a.npy", rows=ROWS[:, :3])
    write(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS)
    write(tmp_path / "b.npy", stop=14)
    (tmp_path / "b.npy.progress.json").unlink()
    write(tmp_path / "b.npy", rows=ROWS[::-1], made_of={"kind": "other"})
    assert np.array_equal(np.load(tmp_path / "b.npy"), ROWS[::-1])


def test_another_commands_rows_that_only_lack_their_name_are_kept(tmp_path, monkeypatch):
    def dies(writer, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "_install", dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.npy is complete and its width is 6, that of this command is 3"):
        write(tmp_path / "a.npy", rows=ROWS[:, :3])
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS)
    assert len(existing(tmp_path / "a.npy", MADE_OF)) == 50


def test_a_complete_array_is_kept_or_the_difference_named(tmp_path):
    assert existing(tmp_path / "a.npy", MADE_OF) is None
    write(tmp_path / "a.npy")
    assert len(existing(tmp_path / "a.npy", MADE_OF)) == 50
    with pytest.raises(ValueError, match="is complete and its store is 'abc', that of this command is 'x'"):
        existing(tmp_path / "a.npy", {"kind": "codes", "store": "x"})


def test_files_of_others_are_not_replaced(tmp_path):
    np.save(tmp_path / "keys.npy", ROWS)
    (tmp_path / "train.json").write_text('{"rows": 3}')
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("keys.npy", "keys.npy is there and no keys.npy.json beside it"),
        ("train", "train.json is there and describes no rows of ours"),
        ("folder", "folder is a folder; name a file in it"),
    ):
        for refuses in (require_ours, write, lambda path: existing(path, MADE_OF)):
            with pytest.raises(ValueError, match=message):
                refuses(tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "keys.npy"), ROWS)
    assert {path.name for path in tmp_path.iterdir()} == {"keys.npy", "train.json", "folder"}
    write(tmp_path / "a.npy")
    require_ours(tmp_path / "a.npy")
    (tmp_path / "a.npy").unlink()
    with pytest.raises(ValueError, match="a.npy is not there, only .*a.npy.json; copy it again"):
        existing(tmp_path / "a.npy", MADE_OF)


def test_damage_is_found(tmp_path):
    write(tmp_path / "a.npy")
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[-3] ^= 4
    (tmp_path / "a.npy").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="a.npy is damaged: the block of bytes 0 to"):
        RowFile.open(tmp_path / "a.npy")
    write(tmp_path / "b.npy")
    side = json.loads((tmp_path / "b.npy.json").read_text())
    (tmp_path / "b.npy.json").write_text(json.dumps(side | {"made_of": {}}))
    with pytest.raises(ValueError, match="b.npy.json is damaged"):
        RowFile.open(tmp_path / "b.npy")


def test_impossible_rows_are_errors(tmp_path):
    with RowWriter(tmp_path / "a.npy", 2, 3, "float16", {}) as writer:
        with pytest.raises(ValueError, match="do not fit"):
            writer.append(np.zeros((3, 3)))
        with pytest.raises(ValueError, match="is not finite in float16"):
            writer.append(np.full((1, 3), 1e6))
        with pytest.raises(ValueError, match="has 0 of 2 rows; they are kept"):
            writer.finish()
        with pytest.raises(OSError, match="another process is writing"):
            RowWriter(tmp_path / "a.npy", 2, 3, "float16", {})
    with pytest.raises(ValueError, match="are no array"):
        RowWriter(tmp_path / "b.npy", 0, 3, "float16", {})
    with pytest.raises(OSError, match="more bytes"):
        RowWriter(tmp_path / "b.npy", 1 << 60, 3, "float16", {})
