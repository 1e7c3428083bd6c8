"""fairseq-datastore quantize as its users see it."""

import json

import numpy as np
import pytest
import torch
from dying import Died

from fairseq.config import UnreadableError
from fairseq.memory.datastore.config import codec_name
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn import features
from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.features import CodedFeatures, _trained
from fairseq.memory.gnn.row_file import RowWriter
from fairseq_cli import datastore

ROWS, DIM = 700, 16


def save(prefix, rows=ROWS, dim=DIM, seed=0, spoiled=None):
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(4, dim, generator=torch.Generator().manual_seed(7))
    keys = torch.randn(rows, 4, generator=generator) @ plane + 0.05 * torch.randn(rows, dim, generator=generator)
    with DatastoreWriter(prefix, rows, dim) as writer:
        writer.append(keys, torch.arange(rows))
        writer.finish()
    if spoiled is not None:
        stored = np.memmap(f"{prefix}_keys.npy", np.float32, "r+", shape=(rows, dim))
        stored[spoiled, 0] = np.nan
        stored.flush()
    return keys


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "train")
    return tmp_path


def quantize(folder, *more, store="train", out="codes.npy"):
    datastore.main(["quantize", str(folder / store), str(folder / out), *map(str, more)])


def test_codes_are_those_of_the_codec_and_the_error_is_of_other_keys(folder, capsys):
    quantize(folder, "--codec", "OPQ4,PQ4", "--sample", 500, "--held-out", 60)
    codec, about = ProductQuantizer.load(folder / "codes.npy.codec")
    store = Datastore.open(folder / "train")
    keys = torch.from_numpy(store.take_keys(np.arange(ROWS)))
    assert np.array_equal(np.load(folder / "codes.npy"), codec.encode(keys).numpy())
    assert torch.equal(
        CodedFeatures.open(folder / "codes.npy", codec, store).take(torch.arange(9)),
        codec.decode(codec.encode(keys[:9])),
    )
    assert codec.rotation_DD is not None
    assert (about["codec"], about["sample"]) == ("OPQ4,PQ4", "500")
    figures = json.loads((folder / "codes.npy.run.json").read_text())["figures"]
    line = capsys.readouterr().out
    assert f"mean relative squared error of 60 other keys: {figures['relative_error']:.4f}" in line
    held_out = np.random.default_rng(1).choice(ROWS, 560, replace=False)[500:]
    lost = (keys - codec.decode(codec.encode(keys))).square().sum(1) / keys.square().sum(1)
    assert figures["relative_error"] == pytest.approx(float(lost[held_out].double().mean()), rel=1e-4)
    assert figures["relative_error"] > float(lost[np.setdiff1d(np.arange(ROWS), held_out)].mean())


def test_the_default_is_a_rotation_and_a_byte_for_eight_numbers(folder, capsys):
    quantize(folder)
    codec, about = ProductQuantizer.load(folder / "codes.npy.codec")
    assert (codec.num_bytes, about["codec"]) == (2, "OPQ2,PQ2")
    assert "on 630 keys; mean relative squared error of 70 other keys" in capsys.readouterr().out


def test_a_killed_command_resumes_to_the_same_bytes(folder, monkeypatch):
    monkeypatch.setattr(features, "_ENCODED_AT_ONCE", 100)
    words = ("--codec", "PQ2", "--codec-file", folder / "codec")
    quantize(folder, *words, out="whole.npy")
    marks = iter(range(100))

    def dying(self, seconds=0.0):
        self.checkpoint()
        if next(marks) == 3:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "checkpoint_when_due", dying)
        with pytest.raises(Died):
            quantize(folder, *words)
    assert json.loads((folder / "codes.npy.progress.json").read_text())["rows_done"] == 400
    trained = (folder / "codec").read_bytes()
    quantize(folder, *words)
    assert (folder / "codes.npy").read_bytes() == (folder / "whole.npy").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ProductQuantizer, "train", lambda *words, **more: pytest.fail("the codec is there"))
        quantize(folder, *words)
    assert (folder / "codec").read_bytes() == trained


def test_another_programs_file_is_not_replaced(folder, monkeypatch):
    monkeypatch.setattr(ProductQuantizer, "train", lambda *words, **more: pytest.fail("before the training"))
    before = (folder / "train_keys.npy").read_bytes()
    with pytest.raises(ValueError, match="train_keys.npy is there and no train_keys.npy.json beside it"):
        quantize(folder, "--codec", "PQ2", out="train_keys.npy")
    assert (folder / "train_keys.npy").read_bytes() == before
    manifest = folder / "codes.npy.run.json"
    for content in ('{"command": "fairseq-datastore convert x"}', "{", ""):
        manifest.write_text(content)
        with pytest.raises(ValueError, match="codes.npy.run.json is there and no fairseq-datastore quantize wrote it"):
            quantize(folder, "--codec", "PQ2")
        assert manifest.read_text() == content


def test_a_store_too_small_or_a_codec_that_does_not_fit_is_an_error(folder):
    save(folder / "small", rows=280)
    with pytest.raises(ValueError, match="252 vectors are too few to learn 256 centroids from"):
        quantize(folder, store="small")
    with pytest.raises(ValueError, match="3 bytes do not divide a width of 16; give one of 1, 2, 4, 8, 16"):
        quantize(folder, "--codec", "PQ3")
    with pytest.raises(ValueError, match="OPQ4_8,PQ4 changes the width of the keys from 16 to 8.*give OPQ4,PQ4"):
        quantize(folder, "--codec", "OPQ4_8,PQ4")
    with pytest.raises(ValueError, match="100 vectors are too few"):
        quantize(folder, "--sample", 100)
    assert not list(folder.glob("codes*"))


def test_a_codec_of_another_store_or_of_other_settings_is_an_error(folder):
    quantize(folder, "--codec", "PQ2")
    save(folder / "other", seed=3)
    save(folder / "wide", dim=32)
    codec = folder / "codes.npy.codec"
    with pytest.raises(
        ValueError, match=r"the store of the codec in .* is \w+, that of this command is \w+; name another"
    ):
        quantize(folder, "--codec", "PQ2", "--codec-file", codec, store="other", out="o.npy")
    with pytest.raises(ValueError, match="holds a codec of width 16, datastore .* has keys of width 32"):
        quantize(folder, "--codec", "PQ2", "--codec-file", codec, store="wide", out="w.npy")
    with pytest.raises(ValueError, match="the codec of the codec in .* is PQ2, that of this command is OPQ2,PQ2"):
        quantize(folder)
    with pytest.raises(ValueError, match="the sample of the codec in .* is 630, that of this command is 300"):
        quantize(folder, "--codec", "PQ2", "--sample", 300)
    codec.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="is complete and the codec it was made with is not at"):
        quantize(folder, "--codec", "PQ2")
    quantize(folder, "--codec", "PQ2", "--codec-file", folder / "elsewhere")


def test_codes_without_their_codec_are_named(folder):
    quantize(folder, "--codec", "PQ2", "--sample", 300)
    store, codec = Datastore.open(folder / "train"), folder / "codes.npy.codec"
    opened = CodedFeatures.with_codec(folder / "codes.npy", store)
    assert opened.codec.digest == ProductQuantizer.load(codec)[0].digest
    assert CodedFeatures.with_codec(folder / "train", store) is None
    assert CodedFeatures.with_codec(folder / "nothing", store) is None
    codec.unlink()
    with pytest.raises(ValueError, match="codes.npy holds codes and their codec is not at .*codes.npy.codec; copy the"):
        CodedFeatures.with_codec(folder / "codes.npy", store)


def test_a_codec_saved_without_its_origin_is_compared_by_its_bytes(folder):
    keys = save(folder / "again")
    codec = ProductQuantizer.train(keys.numpy(), num_bytes=4, rotate=False)
    codec.save(folder / "codec")
    store = Datastore.open(folder / "train")
    assert _trained(str(folder / "codec"), {"codec": "PQ4"}, store).digest == codec.digest
    with pytest.raises(ValueError, match="holds a codec of 4 bytes, this command is of PQ2"):
        _trained(str(folder / "codec"), {"codec": "PQ2"}, store)


def test_keys_that_are_not_finite_are_an_error(folder):
    save(folder / "spoiled", spoiled=690)
    with pytest.raises(ValueError, match=r"1 keys of datastore .* hold NaN or infinity, which no codec holds"):
        quantize(folder, "--codec", "PQ2", store="spoiled")


@pytest.mark.parametrize("text", ["PQ0", "OPQ8,PQ4", "IVF8,PQ4", "PQ4x4", "4", ""])
def test_what_is_no_codec_is_an_error(text):
    with pytest.raises(UnreadableError, match="is no codec; give PQ and the bytes of a code"):
        codec_name(text)


@pytest.mark.parametrize("text", ["PQ128", "OPQ128,PQ128", "OPQ128_1024,PQ128", "PQ64x8"])
def test_codecs_as_faiss_spells_them(text):
    assert codec_name(text) == text
