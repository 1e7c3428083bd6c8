"""The file of --save-retrieval: what goes in comes out, whatever kills the writer in between."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from fairseq.memory.retrieval.file import Retrieval, progress_of
from fairseq.memory.retrieval.writer import RetrievalWriter, existing
from fairseq.memory.types import Candidates, LogSums

N, K, TYPES = 23, 5, 40
MADE_OF = {"joint": False, "text_digest": "t", "k": K}


def tokens(text_sums: bool = False) -> dict:
    """Scored tokens as an evaluation hands them over; the last neighbour of every third one is missing."""
    rng = np.random.default_rng(0)
    keep = torch.ones(N, K, dtype=torch.bool)
    keep[::3, -1] = False
    rows = torch.from_numpy(rng.integers(0, 100, (N, K))).masked_fill(~keep, -1)
    values = torch.from_numpy(rng.integers(0, TYPES, (N, K))).masked_fill(~keep, -1)
    scores = torch.from_numpy(-np.sort(rng.random((N, K), np.float32))).masked_fill(~keep, -torch.inf)
    made = {
        "block_N": torch.arange(N) // 4,
        "target_N": torch.from_numpy(rng.integers(0, TYPES, N)),
        "continues_N": rng.random(N) < 0.3,
        "lm_logp_N": -torch.from_numpy(rng.random(N, np.float32)),
        "lm_norm_N": torch.from_numpy(rng.random(N, np.float32)),
        "text_sums": None,
        "found": Candidates(values, scores, keep, rows),
    }
    if text_sums:
        made["text_sums"] = LogSums(*torch.from_numpy(rng.random((2, N), np.float32)))
    return made


def part(of: dict, start: int, stop: int) -> dict:
    rows = slice(start, stop)
    found, text_sums = of["found"], of["text_sums"]
    return {name: value[rows] for name, value in of.items() if name not in ("found", "text_sums")} | {
        "found": Candidates(*(x[rows] for x in (found.values_NM, found.scores_NM, found.keep_NM, found.rows_NM))),
        "text_sums": LogSums(text_sums.hit_N[rows], text_sums.whole_N[rows]) if text_sums else None,
    }


def writer(
    path: Path, *, text_sums: bool = False, num_types: int = TYPES, num_rows: int = 100, **more
) -> RetrievalWriter:
    words = {"fingerprint": MADE_OF, "about": {"temperature": 2.0}} | more
    return RetrievalWriter(path, N, K, num_types=num_types, num_rows=num_rows, text_sums=text_sums, **words)


def save(path: Path, steps: tuple[int, ...] = (N,), **more) -> dict:
    made = tokens(more.get("text_sums", False))
    with writer(path, **more) as open_writer:
        for start, stop in zip((0, *steps), steps):
            open_writer.append(**part(made, start, stop))
        open_writer.finish()
    return made


@pytest.mark.parametrize("text_sums", [False, True])
@pytest.mark.parametrize(("num_types", "num_rows"), [(TYPES, 100), (70_000, 2**31 + 5)])
def test_what_goes_in_comes_out(tmp_path, text_sums, num_types, num_rows):
    made = save(tmp_path / "r", (7, 8, N), text_sums=text_sums, num_types=num_types, num_rows=num_rows)
    there = Retrieval.open(tmp_path / "r")
    there.verify()
    assert (len(there), there.k, there.is_joint) == (N, K, False)
    assert there.fingerprint == MADE_OF
    assert there.about == {"temperature": 2.0}
    whole, found = there.part(slice(0, N)), made["found"]
    assert torch.equal(whole.target_N, made["target_N"])
    assert torch.equal(whole.lm_logp_N, made["lm_logp_N"])
    assert torch.equal(whole.lm_norm_N, made["lm_norm_N"])
    assert torch.equal(whole.found.keep_NM, found.keep_NM)
    assert torch.equal(whole.found.scores_NM, found.scores_NM)
    assert torch.equal(whole.found.values_NM[found.keep_NM].long(), found.values_NM[found.keep_NM])
    np.testing.assert_array_equal(there.arrays["ids"], found.rows_NM.numpy())
    np.testing.assert_array_equal(there.arrays["continues"], made["continues_N"])
    assert (whole.text_sums is not None) == text_sums
    if text_sums:
        assert torch.equal(whole.text_sums.whole_N, made["text_sums"].whole_N)
    few = there.part(slice(3, 9)).nearest(2)
    assert torch.equal(few.scores_NM, found.scores_NM[3:9, :2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]


def test_it_is_a_safetensors_file(tmp_path):
    made = save(tmp_path / "r")
    with safetensors.safe_open(tmp_path / "r", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("scores"), made["found"].scores_NM)
        np.testing.assert_array_equal(file.get_tensor("block"), made["block_N"])
        assert json.loads(file.metadata()["made_of"]) == MADE_OF


@pytest.mark.parametrize("stop", [0, 1, 9, N])
def test_a_killed_writer_is_gone_on_with(tmp_path, stop):
    save(tmp_path / "whole")
    made = tokens()
    first = writer(tmp_path / "r")
    if stop:
        first.append(**part(made, 0, stop))
    first.close()  # a kill lets go of the lock as this does, and leaves the rest
    assert not (tmp_path / "r").exists()
    if stop:
        with pytest.raises(ValueError, match=rf"r is not complete \({stop} of {N} tokens\); run the command"):
            Retrieval.open(tmp_path / "r")
    with writer(tmp_path / "r") as second:
        assert second.rows_done == stop
        np.testing.assert_array_equal(second.saved().arrays["target"][:stop], made["target_N"][:stop])
        second.append(**part(made, stop, N))
        second.finish()
    assert (tmp_path / "r").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_after_the_last_record_are_written_again(tmp_path):
    made = tokens()
    with writer(tmp_path / "r") as first:
        first.append(**part(made, 0, 9))
        first._write({spec.name: np.ones((3, *spec.shape[1:])) for spec in first._specs}, 3)  # killed before the record
    with writer(tmp_path / "r") as second:
        assert second.rows_done == 9
        second.append(**part(made, 9, N))
        second.finish()
    save(tmp_path / "whole")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_another_command_left_is_thrown_away(tmp_path, caplog):
    with writer(tmp_path / "r") as first:
        first.append(**part(tokens(), 0, 9))
    with writer(tmp_path / "r", fingerprint=MADE_OF | {"text_digest": "other"}) as second:
        assert second.rows_done == 0
    assert "another command left 9 tokens unfinished" in caplog.text
    assert not progress_of(tmp_path / "r").exists()
    with writer(tmp_path / "r") as third:
        third.append(**part(tokens(), 0, 9))
    (tmp_path / "r.tmp").write_bytes(b"")
    with writer(tmp_path / "r") as fourth:
        assert fourth.rows_done == 0
    with writer(tmp_path / "r") as fifth:
        fifth.append(**part(tokens(), 0, 9))
    with writer(tmp_path / "r", resume=False) as sixth:
        assert sixth.rows_done == 0


def test_two_writers_at_once(tmp_path):
    with writer(tmp_path / "r"), pytest.raises(OSError, match="another process is writing"):
        writer(tmp_path / "r")


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    assert existing(tmp_path / "r", MADE_OF) is None
    save(tmp_path / "r")
    assert len(existing(tmp_path / "r", MADE_OF)) == N
    with pytest.raises(
        ValueError, match=r'another evaluation \(there and here: text_digest "t" and "u"\); give another'
    ):
        existing(tmp_path / "r", MADE_OF | {"text_digest": "u"})
    (tmp_path / "notes").write_text("my notes\n")
    with pytest.raises(ValueError, match="notes is no file of --save-retrieval"):
        existing(tmp_path / "notes", MADE_OF)


def damaged(path: Path, how) -> Path:
    data = bytearray(path.read_bytes())
    other = path.with_name("damaged")
    other.write_bytes(how(data))
    return other


def flip(place: int):
    def change(data: bytearray) -> bytes:
        data[place] ^= 1
        return bytes(data)

    return change


FOREIGN = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello, this is text\n" * 9,
    "other safetensors": lambda data: struct.pack("<Q", 2) + b"{}",
    "list": lambda data: struct.pack("<Q", 2) + b"[]",
    "header cut": lambda data: bytes(data[:100]),
    "other format": lambda data: bytes(data).replace(b"fairseq-memory retrieval", b"fairseq-memory something"),
}


@pytest.mark.parametrize("how", FOREIGN.values(), ids=FOREIGN)
def test_other_files_are_told_apart(tmp_path, how):
    save(tmp_path / "r")
    with pytest.raises(ValueError, match="damaged is no file of --save-retrieval: another kind of file, or damaged"):
        Retrieval.open(damaged(tmp_path / "r", how))


def test_damage(tmp_path):
    save(tmp_path / "r")
    size = (tmp_path / "r").stat().st_size
    with pytest.raises(ValueError, match=rf"damaged holds {size - 3} bytes, its header says {size}: it is truncated"):
        Retrieval.open(damaged(tmp_path / "r", lambda data: bytes(data[:-3])))
    with pytest.raises(ValueError, match="its array 'continues' is not as it was saved"):
        Retrieval.open(damaged(tmp_path / "r", flip(size - 1))).verify()
    with pytest.raises(ValueError, match="its array 'block' is not as it was saved"):
        Retrieval.open(
            damaged(tmp_path / "r", flip(size - sum(a.nbytes for a in Retrieval.open(tmp_path / "r").arrays.values())))
        ).verify()
    with pytest.raises(ValueError, match="nothing; eval_lm.py --knnlm --save-retrieval"):
        Retrieval.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        Retrieval.open(tmp_path)


def test_no_room(tmp_path, monkeypatch):
    made = tokens()
    with writer(tmp_path / "r") as first:
        first.append(**part(made, 0, 9))
        with monkeypatch.context() as full:

            def fsync(_: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            full.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="No space left") as raised:
                first.append(**part(made, 9, N))
        assert str(raised.value.filename).endswith("r.tmp")
    with writer(tmp_path / "r") as second:
        assert second.rows_done == 9
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="needs .* more bytes, .* has 10 free; free some"):
        writer(tmp_path / "r")
