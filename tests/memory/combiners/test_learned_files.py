"""Combiners on disk: a round trip, and what is said about damaged and foreign files."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq.memory.combiners.learned_files import MadeFor, load_combiner, read_made_for, save_combiner, sidecar_of

MADE_FOR = MadeFor(
    kind="adaptive",
    k=6,
    temperature=10.0,
    dim=4,
    hidden=8,
    key_tap="model_output",
    metric="l2",
    similarity="recompute",
    model_digest="sha256:aaaaaaaaaaaaaaaa",
    store_digest="sha256:bbbbbbbbbbbbbbbb",
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = MADE_FOR.build(0.2)
    save_combiner(network, MADE_FOR, tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.mark.parametrize("kind", ["adaptive", "kster", "robust"])
def test_round_trip(kind, tmp_path):
    made_for = dataclasses.replace(MADE_FOR, kind=kind)
    network = made_for.build(0.2)
    path = tmp_path / "new" / "c.safetensors"
    save_combiner(network, made_for, path)
    loaded, read = load_combiner(path)
    assert read == made_for == read_made_for(path)
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    assert sorted(file.name for file in path.parent.iterdir()) == ["c.json", "c.safetensors"]


def change_sidecar(path, change):
    side = sidecar_of(path)
    content = json.loads(side.read_text())
    change(content)
    side.write_text(json.dumps(content))


def test_damaged_files_are_named(saved):
    whole = saved.read_bytes()
    fix = "copy both files again, or train it again"
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"c.safetensors is not what .*c.json describes .*; {fix}"):
        load_combiner(saved)
    saved.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{len(whole) - 4} bytes, {len(whole)} when it was written"):
        load_combiner(saved)
    saved.write_bytes(whole)
    change_sidecar(saved, lambda content: content["made_for"].update(k=7))
    with pytest.raises(ValueError, match="c.json is damaged: its checksum does not fit its content"):
        load_combiner(saved)
    change_sidecar(saved, lambda content: content["made_for"].pop("k"))
    with pytest.raises(ValueError, match="c.json is damaged or of another program .it lacks 'made_for.k'."):
        read_made_for(saved)
    change_sidecar(saved, lambda content: content.update(format="other 3"))
    with pytest.raises(ValueError, match="c.json says format 'other 3', this release reads 'fairseq-memory comb"):
        read_made_for(saved)
    sidecar_of(saved).write_text("no JSON")
    with pytest.raises(ValueError, match="c.json is not JSON"):
        read_made_for(saved)
    sidecar_of(saved).unlink()
    with pytest.raises(ValueError, match="--combiner: no file .*c.json; copy both files again"):
        read_made_for(saved)


def test_weights_of_another_network_are_rejected(saved):
    small = dataclasses.replace(MADE_FOR, k=4)
    save_combiner(MADE_FOR.build(), small, saved)  # the description is of another size than the weights
    with pytest.raises(ValueError, match="does not hold the weights that its JSON file describes .*size mismatch"):
        load_combiner(saved)
    network = MADE_FOR.build()
    network.layers[0].bias.data[0] = torch.nan
    save_combiner(network, MADE_FOR, saved)
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        load_combiner(saved)


def test_another_program_wrote_the_weights(saved):
    save_file({"x": torch.zeros(2)}, saved)
    assert load_file(saved)["x"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="is not what .*c.json describes"):
        load_combiner(saved)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"kind": "kster"}, "--combiner c was trained with --knn-lambda-type adaptive, not kster; give"),
        ({"k": 8}, "--combiner c was trained with --k 6, not 8; give --k 6"),
        ({"temperature": 1.0}, "--combiner c was trained with --knn-temp 10.0, not 1.0; give --knn-temp 10.0"),
        ({"metric": "ip"}, "--combiner c was trained with --faiss-metric-type l2, not ip; give"),
        ({"similarity": "index"}, "--combiner c was trained for similarities of kind recompute, this is index; give"),
        ({"dim": 5}, "--combiner c was trained for keys of width 4, this is 5; give"),
        ({"key_tap": "last_ffn_input"}, "--combiner c was trained for keys of model_output, this is last_ffn_input"),
        (
            {"model_digest": "sha256:cccccccccccccccc"},
            "--combiner c was trained for model aaaaaaaaaaaa, this is cccccccccccc; train it again with this model",
        ),
    ],
)
def test_other_uses_are_rejected_with_both_values(now, message):
    with pytest.raises(ValueError, match=message):
        MADE_FOR.require("c", now, strict=False)


def test_another_datastore_is_a_warning_or_an_error(caplog):
    MADE_FOR.require("c", {"store_digest": MADE_FOR.store_digest}, strict=True)
    MADE_FOR.require("c", {"store_digest": "sha256:dddddddddddddddd"}, strict=False)
    wanted = "--combiner c was trained for datastore bbbbbbbbbbbb, this is dddddddddddd; train it again with this one"
    assert wanted in caplog.text
    with pytest.raises(ValueError, match=wanted):
        MADE_FOR.require("c", {"store_digest": "sha256:dddddddddddddddd"}, strict=True)
