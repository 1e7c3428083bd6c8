"""A flipped bit in any file of ours is found by opening or verifying it, or provably changes no number."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, save_checkpoint
from fairseq.data.bm25.index import open_index
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.storage import load_memory, save_memory
from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.row_file import RowFile, RowWriter
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.retrieval.file import Retrieval
from fairseq.memory.retrieval.writer import RetrievalWriter
from fairseq.memory.types import Candidates
from fairseq.verification.kinds import verify
from fairseq.verification.recognition import recognised
from fairseq_cli.datastore import main
from tests.helpers import store_making

FLIPS = 25  # of each kind: 200 together


def make_store(folder: Path) -> None:
    store_making.save(folder / "s", 200, documents=(120, 80))
    delete(folder / "s", np.array([3, 50]))


def make_index(folder: Path) -> None:
    store_making.save(folder / "s", 200)
    build_index(
        BuildConfig(dstore_mmap=str(folder / "s"), faiss_index=str(folder / "x"), index="flat", use_faiss_cpu=True)
    )
    for path in folder.glob("s*"):
        path.unlink()


def make_clusters(folder: Path) -> None:
    Clusters.of_assignment(np.arange(300) % 7, 7, "a store").save(folder / "c.npz")


def make_neighbors(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(0, 90, (40, 4)))
    found = Candidates(rows % 9, torch.from_numpy(rng.random((40, 4), np.float32)), rows >= 0, rows)
    about = {"temperature": 2.0, "program": "eval_lm.py"}
    made_of = {"joint": False, "text_digest": "t", "dim": 4, "shard": [0, 1]}
    logp = -torch.rand(40)
    words = {"num_types": 9, "num_rows": 90, "text_sums": False, "fingerprint": made_of, "about": about}
    with RetrievalWriter(folder / "r", 40, 4, **words) as writer:
        writer.append(torch.arange(40) // 4, rows[:, 0] % 9, np.zeros(40, bool), logp, logp, None, found)
        writer.finish()


def make_memory(folder: Path) -> None:
    layers = {n: LayerMemory(torch.randn(2, 30, 4), torch.randn(2, 30, 4)) for n in (0, 3)}
    made = Memory(layers, torch.arange(40), torch.arange(5, 35), (0, 20), "digest", "relative", 7)
    save_memory(made, folder / "m.safetensors")


def make_bm25(folder: Path) -> None:
    words = np.random.default_rng(0).integers(0, 60, (30, 12))
    lines = [{"id": str(n), "contents": " ".join(f"word{w}" for w in row)} for n, row in enumerate(words)]
    (folder / "segments.json").write_text("[" + ",\n".join(map(json.dumps, lines)) + "]\n")
    open_index(folder / "index", folder / "segments.json")
    (folder / "segments.json").unlink()


def make_text(folder: Path) -> None:
    with MMapIndexedDatasetBuilder(folder / "t.bin", np.uint16) as builder:
        for length in range(1, 30):
            builder.add_item(np.arange(length))
        builder.finalize(folder / "t.idx")


def make_checkpoint(folder: Path) -> None:
    weights = {f"decoder.layers.{n}.w": torch.randn(20, 20) for n in range(3)}
    state = {"state": {0: {"exp_avg": torch.randn(20, 20)}}}
    config = {"task": {"name": "language_modeling"}, "model": {"arch": "a"}}
    save_checkpoint(str(folder / "p.pt"), Checkpoint(config, weights, optimizer=state))


def make_rows(folder: Path) -> None:
    rng = np.random.default_rng(0)
    codec = ProductQuantizer(torch.from_numpy(rng.standard_normal((2, 256, 3), np.float32)))
    codec.save(folder / "codes.npy.codec", {"store": "a store"})
    with RowWriter(folder / "codes.npy", 300, 2, "uint8", {"kind": "codes", "codec": codec.digest}) as writer:
        writer.append(rng.integers(0, 256, (300, 2)))
        writer.finish()


def row_numbers(path: Path) -> object:
    held = RowFile.open(path)
    return np.asarray(held.rows.block(0, 300)).tobytes(), dict(held.made_of), codec_numbers(Path(f"{path}.codec"))


def codec_numbers(path: Path) -> object:
    codec, said = ProductQuantizer.load(path)
    return codec.centroid_MJW.numpy().tobytes(), said


def store_numbers(path: Path) -> object:
    store = Datastore.open(path)
    keys, values = np.asarray(store.keys.block(0, 200)), np.asarray(store.values)
    return keys.tobytes(), values.tobytes(), store.deleted.tolist(), np.asarray(store.documents.runs_R3).tolist()


def index_numbers(path: Path) -> object:
    return path.with_suffix(".l2").read_bytes(), json.loads(path.with_suffix(".l2.json").read_text())


def cluster_numbers(path: Path) -> object:
    held = Clusters.read(path)
    return held.cluster_R.tolist(), held.member_R.tolist(), held.first_C.tolist(), held.store


def neighbor_numbers(path: Path) -> object:
    held = Retrieval.open(path)
    return {name: array.tobytes() for name, array in held.arrays.items()}, held.fingerprint, held.about


def memory_numbers(path: Path) -> object:
    held = load_memory(path)
    layers = [(n, at.key_GSD.numpy().tobytes(), at.value_GSD.numpy().tobytes()) for n, at in held.layers.items()]
    facts = (held.document_starts, held.model_digest, held.positions, held.reach)
    return layers, held.token_N.tolist(), held.place_S.tolist(), facts


def bm25_numbers(folder: Path) -> object:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "about.json"}


def text_numbers(path: Path) -> object:
    return [sentence.tolist() for sentence in MMapIndexedDataset(path)]


def checkpoint_numbers(path: Path) -> object:
    held = load_checkpoint(str(path), whole=True)
    moments = held.optimizer["state"][0]["exp_avg"]
    return {n: w.numpy().tobytes() for n, w in held.model.items()}, held.config, moments.numpy().tobytes()


KINDS = {
    "datastore": (make_store, "s", store_numbers),
    "index": (make_index, "x", index_numbers),
    "clusters": (make_clusters, "c.npz", cluster_numbers),
    "rows": (make_rows, "codes.npy", row_numbers),
    "saved neighbours": (make_neighbors, "r", neighbor_numbers),
    "memory": (make_memory, "m.safetensors", memory_numbers),
    "bm25 index": (make_bm25, "index", bm25_numbers),
    "binarised text": (make_text, "t", text_numbers),
    "checkpoint": (make_checkpoint, "p.pt", checkpoint_numbers),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, kind):
    make, name, numbers = KINDS[kind]
    make(tmp_path)
    path = tmp_path / name
    found = recognised(path)
    assert [each for each, _ in found] == [kind]
    assert verify(*found[0])
    before = numbers(path)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    rng, silent = np.random.default_rng(14), []
    for number in range(FLIPS):
        file = files[number % len(files)]
        data = file.read_bytes()
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        file.unlink()  # another file: the old one may still be mapped
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            for each, target in recognised(path):
                verify(each, target)
            if numbers(path) != before:
                silent.append((file.name, place, bit))
        except (ValueError, OSError) as error:  # anything else is a traceback to the user
            if tmp_path.name not in str(error):
                silent.append(f"{file.name} is not named: {error}")
        file.unlink()
        file.write_bytes(data)
    assert not silent
    assert numbers(path) == before


def test_the_command_takes_several_paths_and_names_the_damaged_one(tmp_path, capsys):
    make_text(tmp_path)
    make_clusters(tmp_path)
    make_checkpoint(tmp_path)
    paths = [str(tmp_path / name) for name in ("t", "c.npz", "p.pt")]
    main(["verify", *paths])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == paths
    data = bytearray((tmp_path / "t.bin").read_bytes())
    data[40] ^= 4
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.bin is damaged .*differs"):
        main(["verify", *paths])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_rows_are_verified_whole_however_large_and_with_their_codec(tmp_path, capsys, monkeypatch):
    make_rows(tmp_path)
    (tmp_path / "recall.json").write_text('{"format": "fairseq-memory recall 1", "curves": [{"made_of": {}}]}')
    main(["verify", str(tmp_path)])
    said = capsys.readouterr().out
    assert "codes.npy: rows, 300 rows of codes: every block is as it was saved, and made with codes.npy.codec\n" in said
    assert "codes.npy.codec: codec, 2 bytes for a width of 6: it is as it was saved\n" in said
    assert "recall.json" in said.splitlines()[-1]  # not compared
    monkeypatch.setattr("fairseq.runtime.file_marks.COMPARED_WHOLE", 10)  # of longer ones opening compares the ends
    path = tmp_path / "codes.npy"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:400] + bytes([data[400] ^ 4]) + data[401:])
    RowFile.open(path)
    with pytest.raises(ValueError, match="codes.npy is damaged: the block of bytes 0 to 727 differs"):
        main(["verify", str(path)])
    path.write_bytes(data)
    ProductQuantizer(torch.zeros(2, 256, 3)).save(tmp_path / "codes.npy.codec")
    with pytest.raises(ValueError, match="codes.npy.codec is not the codec that the codes in .* were made with"):
        main(["verify", str(path)])
    (tmp_path / "codes.npy.codec").unlink()
    main(["verify", str(path)])
    assert "there is no codes.npy.codec beside them" in capsys.readouterr().out
    path.unlink()
    for name in ("codes.npy", "codes.npy.json"):
        with pytest.raises(ValueError, match=r"codes.npy is not there, only .*codes.npy.json; copy it again"):
            main(["verify", str(tmp_path / name)])


def test_shards_of_rows_are_verified_by_the_name_of_the_whole(tmp_path, capsys):
    for shard in range(2):
        with RowWriter(tmp_path / f"n.shard{shard}of2", 3, 2, "int32", {"kind": "neighbors"}) as writer:
            writer.append(np.zeros((3, 2)))
            writer.finish()
    (tmp_path / "n.shard0of2.run.json").write_text('{"command": "fairseq-neighbors"}')
    main(["verify", str(tmp_path / "n")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / f"n.shard{shard}of2") for shard in range(2)]


def test_weights_without_checksums_are_read(tmp_path):
    make_checkpoint(tmp_path)
    plain = tmp_path / "plain.pt"
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(tmp_path / "p.pt", weights_only=True), plain)
    finally:
        torch.serialization.set_crc32_options(kept)
    assert not any(entry.CRC for entry in zipfile.ZipFile(plain).infolist())
    assert checkpoint_numbers(plain) == checkpoint_numbers(tmp_path / "p.pt")
    assert "no checksums" in verify("checkpoint", plain)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'{"rows": ' + b"[" * 100_000, b'{"format_version": 1}', b"\xff\xfe"]
)
def test_a_made_up_json_file_ends_in_one_line(tmp_path, content):
    for make, name in ((make_store, "s.json"), (make_text, "t.sums.json")):
        make(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as raised:
            main(["verify", str(tmp_path / name.partition(".")[0])])
        assert "\n" not in str(raised.value)


def test_the_scores_of_an_evaluation_are_verified(tmp_path):
    scores = tmp_path / "scores-valid.npz"
    np.savez_compressed(scores, block=np.zeros(3), target=np.arange(300), logp=np.random.default_rng(0).random(300))
    assert [verify(kind, name) for kind, name in recognised(scores)] == ["3 arrays: every one is as it was saved"]
    data = bytearray(scores.read_bytes())
    data[len(data) // 2] ^= 4
    scores.write_bytes(data)
    with pytest.raises(ValueError, match="scores-valid.npz is damaged"):
        main(["verify", str(scores)])
