"""The run manifest records command, inputs and figures, and is replaced whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from fairseq.runtime import atomic_files, manifest
from fairseq.runtime.hardware import INSTRUCTION_SETS, cpu_features


def test_a_manifest_says_how_a_number_came_about(tmp_path: Path) -> None:
    source = tmp_path / "in.bin"
    source.write_bytes(b"abc" * 1000)
    path = tmp_path / "sub" / "out.run.json"
    manifest.write_manifest(
        path, program="x.py", argv=["a b", "--c"], config={"k": 1}, figures={"ppl": 2.5}, inputs=[source], seed=7
    )
    record = json.loads(path.read_text())
    assert record["command"] == "x.py 'a b' --c"
    assert record["figures"] == {"ppl": 2.5}
    assert record["seed"] == 7
    digest = hashlib.sha256(b"abc" * 1000).hexdigest()
    assert record["inputs"][str(source)] == {"bytes": 3000, "digest": f"sha256:{digest}"}
    assert record["versions"]["python"]
    assert record["hardware"]["cores"] >= 1
    assert set(record["hardware"]["instructions"]) == set(INSTRUCTION_SETS) & cpu_features()


def test_digests_from_the_background_are_those_of_the_files_at_the_end(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("kept", "replaced", "empty")]
    for path, content in zip(paths, (b"a" * 100_000, b"b", b"")):
        path.write_bytes(content)
    manifest.begin_digests([*paths, tmp_path / "missing"])
    os.utime(paths[1], ns=(1, 1))  # so that the next content has another time for certain
    paths[1].write_bytes(b"c")
    manifest.write_manifest(tmp_path / "run.json", program="x", argv=[], config={}, figures={}, inputs=paths)
    inputs = json.loads((tmp_path / "run.json").read_text())["inputs"]
    for path in paths:
        assert inputs[str(path)]["digest"] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_large_files_are_sampled_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_WHOLE_FILE_LIMIT", 100)
    monkeypatch.setattr(manifest, "_SAMPLED_BYTES", 10)
    path = tmp_path / "big"
    path.write_bytes(bytes(range(200)))
    first = manifest.file_digest(path)
    assert first.startswith("sha256-of-size-and-ends:")
    path.write_bytes(bytes(range(199)) + b"\x00")
    assert manifest.file_digest(path) != first


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    atomic_files.write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_files.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_folder_whose_mode_forbids_writing_is_left_alone(tmp_path: Path) -> None:
    assert atomic_files.may_write_in(tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert not atomic_files.may_write_in(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert not atomic_files.may_write_in(tmp_path / "missing")
