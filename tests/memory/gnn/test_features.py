import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.features import CodedFeatures, KeyFeatures, encode_store, sample_of
from fairseq.memory.index.faiss_library import faiss_library

ROWS, DIM = 600, 8


def keys(seed=0, rows=ROWS):
    """Vectors that lie near a plane, so that few bytes hold them."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(3, DIM, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 3, generator=generator) @ plane + 0.05 * torch.randn(rows, DIM, generator=generator)


def save(prefix, key_ND):
    with DatastoreWriter(prefix, len(key_ND), DIM, "float16") as writer:
        writer.append(key_ND, torch.arange(len(key_ND)))
        writer.finish()
    return Datastore.open(prefix)


@pytest.fixture
def store(tmp_path):
    return save(tmp_path / "store", keys())


@pytest.fixture(scope="module")
def codec():
    return ProductQuantizer.train(keys().numpy(), num_bytes=4)


def test_key_features_are_the_stores_keys(store):
    features = KeyFeatures.of(store)
    position = torch.tensor([5, 3, 5, 599])
    assert torch.equal(features.take(position), keys().half().float()[position])
    assert (len(features), features.dim) == (ROWS, DIM)


@pytest.mark.parametrize("rotate", [True, False])
def test_codes_are_those_of_faiss(rotate):
    faiss, sample = faiss_library(), keys().numpy()
    codec = ProductQuantizer.train(sample, num_bytes=4, rotate=rotate, seed=3)
    rotated = sample if codec.rotation_DD is None else sample @ codec.rotation_DD.numpy().T
    quantizer = faiss.ProductQuantizer(DIM, 4, 8)
    faiss.copy_array_to_vector(codec.centroid_MJW.numpy().ravel(), quantizer.centroids)
    wanted = quantizer.compute_codes(np.ascontiguousarray(rotated))
    assert np.array_equal(codec.encode(keys()).numpy(), wanted)
    decoded = quantizer.decode(wanted)
    decoded = decoded if codec.rotation_DD is None else decoded @ codec.rotation_DD.numpy()
    assert np.abs(codec.decode(torch.from_numpy(wanted)).numpy() - decoded).max() < 1e-6


def test_an_offset_is_added_before_encoding_and_taken_away_after(codec):
    offset = torch.linspace(-1, 1, DIM)
    shifted = ProductQuantizer(codec.centroid_MJW + offset.view(4, 1, 2), codec.rotation_DD, offset)
    code = codec.encode(keys())
    assert (shifted.encode(keys()) != code).float().mean() < 0.01  # the last bit of a distance may decide another way
    assert torch.allclose(shifted.decode(code), codec.decode(code), atol=1e-5)


def test_the_error_is_relative_to_the_length(codec):
    held_out = keys(seed=1)
    lost = (held_out - codec.decode(codec.encode(held_out))).square().sum(1) / held_out.square().sum(1)
    assert codec.relative_error(held_out) == pytest.approx(float(lost.mean()), rel=1e-5)
    unrotated = ProductQuantizer.train(keys().numpy(), num_bytes=4, rotate=False)
    assert codec.relative_error(held_out) < unrotated.relative_error(held_out) / 2
    assert codec.relative_error(held_out) < 0.05
    assert codec.relative_error(torch.zeros(3, DIM)) == 0.0


def test_a_codec_is_saved_whole(codec, tmp_path):
    codec.save(tmp_path / "codec", {"store": "x"})
    loaded, metadata = ProductQuantizer.load(tmp_path / "codec")
    assert loaded.digest == codec.digest
    assert metadata == {"store": "x"}
    assert torch.equal(loaded.decode(codec.encode(keys())), codec.decode(codec.encode(keys())))
    content = bytearray((tmp_path / "codec").read_bytes())
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert list(about) == sorted(about), "the same bytes in every process"
    content[-1] ^= 1
    (tmp_path / "codec").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged: its digest differs"):
        ProductQuantizer.load(tmp_path / "codec")
    (tmp_path / "other").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is no product quantizer"):
        ProductQuantizer.load(tmp_path / "other")


def test_what_a_file_says_of_its_codec_belongs_to_its_digest(codec, tmp_path):
    path = tmp_path / "codec"
    codec.save(path, {"store": "one"})

    def rewrite(**changed):
        with safetensors.safe_open(path, "pt") as file:
            said = {name: value for name, value in (file.metadata() | changed).items() if value is not None}
            save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "other", said)  # noqa: SIM118
        return tmp_path / "other"

    assert ProductQuantizer.load(rewrite())[1] == {"store": "one"}
    first = "fairseq-memory product quantizer 1"
    for changed in ({"store": "two"}, {"seed": "1"}, {"store": None}, {"metadata_digest": None}, {"format": first}):
        with pytest.raises(ValueError, match="other is damaged: its digest differs from its content; copy it again"):
            ProductQuantizer.load(rewrite(**changed))
    # A file of the releases before: nothing holds what it says.
    loaded, said = ProductQuantizer.load(rewrite(format=first, metadata_digest=None))
    assert loaded.digest == codec.digest
    assert said == {"store": "one"}


def test_coded_features_are_the_decoded_codes(store, codec, tmp_path):
    features = encode_store(store, codec, tmp_path / "codes.npy")
    position = torch.tensor([5, 3, 5, 599])
    wanted = codec.decode(codec.encode(keys().half().float()[position]))
    assert torch.equal(features.take(position), wanted)
    assert np.load(tmp_path / "codes.npy").shape == (ROWS, 4)
    again = encode_store(store, codec, tmp_path / "codes.npy")
    assert again.digest == features.digest != KeyFeatures.of(store).digest


def test_codes_of_another_codec_or_store_are_rejected(store, codec, tmp_path):
    encode_store(store, codec, tmp_path / "codes.npy")
    other_codec = ProductQuantizer.train(keys(seed=2).numpy(), num_bytes=4)
    with pytest.raises(ValueError, match="holds codes of another codec"):
        CodedFeatures.open(tmp_path / "codes.npy", other_codec)
    with pytest.raises(ValueError, match="holds codes of another store"):
        CodedFeatures.open(tmp_path / "codes.npy", codec, save(tmp_path / "other", keys(seed=2)))
    with pytest.raises(ValueError, match="is complete and its codec is"):
        encode_store(store, other_codec, tmp_path / "codes.npy")


def test_a_sample_is_of_the_whole_text(store):
    sample = sample_of(store, 50)
    found = [int((keys().half().float() == torch.from_numpy(row)).all(1).nonzero()[0, 0]) for row in sample]
    assert len(set(found)) == 50
    assert found == sorted(found)
    assert found[-1] > ROWS // 2
    assert len(sample_of(store, 10**6)) == ROWS


@pytest.mark.parametrize(("rows", "num_bytes", "message"), [(600, 3, "give one of 1, 2, 4, 8"), (100, 4, "too few")])
def test_what_cannot_be_learned_is_an_error(rows, num_bytes, message):
    with pytest.raises(ValueError, match=message):
        ProductQuantizer.train(keys(rows=rows).numpy(), num_bytes)


GOLDEN = Path(os.environ.get("FAIRSEQ_GOLDEN", "/nowhere")) / "gnn" / "hgt_cases.pt"


@pytest.mark.skipif(not GOLDEN.exists(), reason="FAIRSEQ_GOLDEN names no folder with GNN-LM's stored run")
def test_the_published_programs_codes_are_decoded():
    stored = torch.load(GOLDEN, weights_only=True)
    parts = stored["pq"]
    codec = ProductQuantizer(parts["centroids"], parts["A"], parts["b"] if len(parts["b"]) else None)
    assert (codec.decode(parts["codes"]) - parts["decoded"]).abs().max() < 1e-6
    assert torch.equal(codec.encode(stored["corpus_feats"]), parts["codes"])
