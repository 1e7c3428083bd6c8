import json

import numpy as np
import pytest
from dying import dies_at_event

from fairseq.memory.gnn.row_file import RowFile, RowWriter, existing

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


def test_another_commands_rows_are_not_mixed_in(tmp_path, caplog):
    write(tmp_path / "a.npy", stop=14)
    write(tmp_path / "a.npy", made_of={"kind": "other"}, rows=ROWS[::-1])
    assert "another command left 14 rows unfinished; they are discarded" in caplog.text
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS[::-1])


def test_a_complete_array_is_kept_or_the_difference_named(tmp_path):
    assert existing(tmp_path / "a.npy", MADE_OF) is None
    write(tmp_path / "a.npy")
    assert len(existing(tmp_path / "a.npy", MADE_OF)) == 50
    with pytest.raises(ValueError, match="is complete and its store is 'abc', that of this command is 'x'"):
        existing(tmp_path / "a.npy", {"kind": "codes", "store": "x"})


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
