"""Checkpoints are whole or absent, hold plain types, and say what does not fit."""

import errno
import os

import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, load_model, save_checkpoint
from fairseq.config import to_dict
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel

SMALL = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_layers": 3, "decoder_attention_heads": 2}
TIED = {
    "adaptive_input": True,
    "adaptive_input_cutoff": (5,),
    "adaptive_softmax_cutoff": (5,),
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
}


def make(**settings):
    torch.manual_seed(0)
    model = TransformerLanguageModel.build(TransformerLMConfig(**SMALL | settings), 12, 1)
    config = {"task": {"name": "language_modeling"}, "model": to_dict(model.config) | {"arch": "transformer_lm"}}
    return model, Checkpoint(config, model.state_dict())


@pytest.mark.parametrize("settings", [{}, TIED, {"share_decoder_input_output_embed": True}])
def test_round_trip(tmp_path, settings):
    model, checkpoint = make(**settings)
    optimizer = torch.optim.Adam(model.parameters())
    model.target_logp(model(torch.tensor([[4, 5, 11]])).hidden_BTD[0], torch.tensor([5, 11, 2]))[0].sum().backward()
    optimizer.step()
    whole = Checkpoint(
        checkpoint.config,
        model.state_dict(),
        optimizer=optimizer.state_dict(),
        scheduler={"best": None, "pair": (0.1, 0.2)},
        iterator={"epoch": 2},
        progress={"num_updates": 1, "figures": {"loss": 8.25}},
    )
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, whole)
    assert isinstance(torch.load(path, weights_only=True), dict)
    back = load_checkpoint(path)
    assert (back.config, back.scheduler, back.iterator, back.progress) == (
        whole.config,
        whole.scheduler,
        whole.iterator,
        whole.progress,
    )
    again = load_model(back, 12, 1)
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert len(list(again.parameters())) == len(list(model.parameters()))
    fresh = torch.optim.Adam(again.parameters())
    fresh.load_state_dict(back.optimizer)
    states = zip(fresh.state.values(), optimizer.state.values())
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in states)


def test_training_on_leaves_the_checkpoint_alone():
    _, checkpoint = make()
    before = {name: value.clone() for name, value in checkpoint.model.items()}
    with torch.no_grad():
        for value in load_model(checkpoint, 12, 1).parameters():
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.model.items())


def test_only_plain_types_are_written(tmp_path):
    _, checkpoint = make()
    with pytest.raises(TypeError, match=r"config\.task\.x\[1\] is a set"):
        save_checkpoint(str(tmp_path / "a.pt"), Checkpoint({"task": {"x": [1, {2}]}}, checkpoint.model))
    assert not os.listdir(tmp_path)


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("room", [0, 100, 5000, 12000])
def test_a_full_disk_leaves_the_file_before(tmp_path, monkeypatch, room):
    model, checkpoint = make()
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, checkpoint)
    recorder = checkpoint_utils._Recorder
    monkeypatch.setattr(checkpoint_utils, "_Recorder", lambda file: recorder(Full(file, room)))
    with pytest.raises(OSError, match=r"No space left on device.*a\.pt") as caught:
        save_checkpoint(path, Checkpoint({}, {"w": torch.zeros(10000)}))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load_model(load_checkpoint(path), 12, 1).config == model.config


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    save_checkpoint(str(tmp_path / "gone" / "a.pt"), make()[1])
    assert [path.name for path in (tmp_path / "gone").iterdir()] == ["a.pt"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.a\.pt|file"):
        save_checkpoint(str(tmp_path / "file" / "a.pt"), make()[1])


def test_a_run_killed_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    _, checkpoint = make()
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, checkpoint)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, Checkpoint({}, {}))
    assert load_checkpoint(path).model.keys() == checkpoint.model.keys()


def test_a_file_cut_short(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(str(path), make()[1])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a checkpoint: it is damaged, cut short"):
        load_checkpoint(str(path))


def test_a_file_of_a_later_version(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save({"format": "fairseq-memory checkpoint", "version": 3}, path)
    with pytest.raises(ValueError, match="version 3, this program reads 1 and 2; update it"):
        load_checkpoint(path)


@pytest.mark.parametrize("settings", [{}, TIED])
def test_another_dictionary(settings):
    with pytest.raises(ValueError, match="dictionary of 12 types, the data's has 13"):
        load_model(make(**settings)[1], 13, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder_ffn_embed_dim": 6}, r"layers\.0\.fc1\.weight has shape \(8, 8\) in the checkpoint and \(6, 8\)"),
        ({"decoder_layers": 4}, r"the model has a weight decoder\.layers\.3\..* the checkpoint has none"),
        ({"decoder_layers": 2}, r"the checkpoint has a weight decoder\.layers\.2\..* the model has none"),
        ({"decoder_layer": 2}, "no setting 'decoder_layer' .did you mean 'decoder_layers'"),
        ({"decoder_layers_to_keep": "0,3"}, "0,3: the checkpoint has layers 0 to 2"),
        ({"dropout": 2}, "--dropout 2"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_model(make()[1], 12, 1, overrides)


def test_overrides(caplog):
    model = load_model(make()[1], 12, 1, {"knn_keytype": "model_output", "dropout": 0.5, "dstore_size": 3})
    assert (model.config.knn_keytype, model.config.dropout) == ("model_output", 0.5)
    assert "dstore_size is no setting of the model and is ignored" in caplog.text


def test_some_layers_are_kept():
    whole, checkpoint = make()
    model = load_model(checkpoint, 12, 1, {"decoder_layers_to_keep": "0,2"})
    for mine, its in zip(model.decoder.layers, (whole.decoder.layers[0], whole.decoder.layers[2])):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters()))
    config = {"task": checkpoint.config["task"], "model": to_dict(model.config)}
    again = load_model(Checkpoint(config, model.state_dict()), 12, 1)
    assert len(again.decoder.layers) == 2
