"""Two commands that write one output at the same time: the second is rejected, or both are right.

``FAIRSEQ_PAIRS=100`` runs so many pairs instead of 6; ``FAIRSEQ_PAIRS_SEED`` draws other moments.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_MODEL, Command
from forked_commands import Forks

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter

PAIRS = int(os.environ.get("FAIRSEQ_PAIRS", "6"))

pytestmark = pytest.mark.slow


def test_pairs_of_commands_leave_what_one_leaves(data_bin: Path, trained: Path, forks: Forks, tmp_path: Path) -> None:
    program, paths = ROOT / "tests" / "helpers" / "pairs.py", [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
    script = tmp_path / "pairs.py"
    script.write_text(
        f"import runpy, sys\nsys.path += {paths}\nrunpy.run_path({str(program)!r}, run_name='__main__')\n"
    )
    done = forks.start(str(script), tmp_path / "pairs", data_bin, trained / "checkpoint_best.pt", PAIRS)
    code = done.wait()
    pairs = [json.loads(line) for line in done.out.splitlines()]
    assert [pair for pair in pairs if pair["faults"]] == []
    assert len(pairs) == PAIRS
    assert code == 0, done.err
    rejected = sum(sorted(pair["codes"]) == [0, 2] for pair in pairs)
    assert 0 < rejected < PAIRS, "the commands never met, or always"


@pytest.mark.parametrize(
    "line",
    [
        "train.py {data} --save-dir {out}/run --max-update 3 " + " ".join(TINY_MODEL),
        "preprocess.py --only-source --trainpref {data}/../train.txt --destdir {out}/run",
    ],
    ids=["train", "preprocess"],
)
def test_a_pair_of_processes(data_bin: Path, command: Command, forks: Forks, tmp_path: Path, line: str) -> None:
    def names(folder: Path) -> set[str]:
        return {path.name for path in (folder / "run").iterdir()}

    both = [forks.start(*line.format(data=data_bin, out=tmp_path / "pair").split()) for _ in range(2)]
    codes = [process.wait(120) for process in both]
    assert 0 in codes
    for process, other in zip(both, reversed(both)):
        if process.returncode:
            assert process.returncode == 2, process.err
            assert f"(process {other.pid} on {socket.gethostname()}, " in process.err.splitlines()[-1]
    command(*line.format(data=data_bin, out=tmp_path / "alone").split())
    assert names(tmp_path / "pair") == names(tmp_path / "alone")


def test_a_copy_does_not_replace_a_store_that_came_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq.memory.datastore import convert

    def save(name: str) -> Datastore:
        with DatastoreWriter(tmp_path / name, 20, 4) as writer:
            writer.append(np.ones((20, 4), np.float32), np.arange(20))
            writer.finish()
        return Datastore.open(tmp_path / name)

    source = save("source")

    class Late(DatastoreWriter):
        """Is made after another command has completed a store of the same name."""

        def __init__(self, *words: object, **more: object) -> None:
            if not (tmp_path / "new.json").exists():
                save("new")
            super().__init__(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "DatastoreWriter", Late)
    with pytest.raises(ValueError, match=r"new\.json is that of another datastore"):
        convert.sample(source, tmp_path / "new", 5, seed=1)
    assert len(Datastore.open(tmp_path / "new")) == 20
    assert {path.name for path in tmp_path.glob("new*")} == {"new.json", "new_keys.npy", "new_vals.npy"}
