"""Files of fairseq, knnlm and TRIME become plain settings and weights; no pickle ever runs code."""

import argparse
import collections
import enum
import importlib
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile

import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint, load_model
from fairseq.checkpoints.legacy import plain, read_fairseq_checkpoint, read_pickle
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel

SMALL = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_layers": 1, "decoder_attention_heads": 2}
ARGS = SMALL | {
    "task": "language_modeling",
    "arch": "transformer_lm",
    "criterion": "cross_entropy",
    "optimizer": "nag",
    "lr_scheduler": "cosine",
    "data": "data-bin/x",
    "sample_break_mode": "none",
    "tokens_per_sample": 32,
    "max_target_positions": None,
    "add_bos_token": False,
    "decoder_normalize_before": True,
    "dropout": 0.25,
    "lr": [0.1],
}
FORMATS = pytest.mark.parametrize("zipped", [True, False])


def weights(**settings):
    torch.manual_seed(0)
    return TransformerLanguageModel.build(TransformerLMConfig(**SMALL | settings), 12, 1).state_dict()


def write(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return str(path)


class Payload:
    def __init__(self, function, *parts):
        self.call = (function, parts)

    def __reduce__(self):
        return self.call


@FORMATS
def test_flat_settings(tmp_path, zipped):
    content = {"args": argparse.Namespace(**ARGS), "model": weights(), "optimizer_history": [{"num_updates": 7}]}
    path = write(tmp_path / "old.pt", content, zipped)
    found = read_fairseq_checkpoint(path)
    assert found["config"]["task"] == {
        "name": "language_modeling",
        "data": "data-bin/x",
        "sample_break_mode": "none",
        "tokens_per_sample": 32,
        "max_target_positions": None,
        "add_bos_token": False,
    }
    assert found["config"]["chosen"]["criterion"] == "cross_entropy"
    assert found["config"]["model"]["max_target_positions"] == 32
    assert found["config"]["model"]["dropout"] == 0.25
    assert found["progress"] == {"num_updates": 7}
    model = load_model(load_checkpoint(path), 12, 1)
    assert all(torch.equal(value, content["model"][name]) for name, value in model.state_dict().items())
    assert model.max_positions == 32


@FORMATS
def test_nested_settings_with_references(tmp_path, zipped):
    model = SMALL | {
        "_name": "transformer_lm",
        "decoder_normalize_before": False,
        "no_decoder_final_norm": False,
        "max_target_positions": "${task.max_target_positions}",
        "tokens_per_sample": "${task.tokens_per_sample}",
        "knn_keytype": "???",
        "base_layers": 0,
    }
    task = {"_name": "language_modeling", "tokens_per_sample": 48, "max_target_positions": None}
    cfg = {"task": task, "model": model, "criterion": {"_name": "cross_entropy"}, "optimizer": None}
    content = {"args": None, "cfg": cfg, "model": weights(decoder_normalize_before=False)}
    loaded = load_checkpoint(write(tmp_path / "new.pt", content, zipped))
    assert loaded.config["chosen"]["arch"] == loaded.config["model"]["arch"] == "transformer_lm"
    assert load_model(loaded, 12, 1).max_positions == 48
    assert not load_model(loaded, 12, 1).config.decoder_normalize_before


def test_settings_as_omegaconf_containers_and_enumerations(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    foreign = types.ModuleType("fairseq.dataclass_of_another_program")

    class BreakMode(enum.Enum):
        none = "none"

    BreakMode.__module__, BreakMode.__qualname__ = foreign.__name__, "BreakMode"
    foreign.BreakMode = BreakMode
    sys.modules[foreign.__name__] = foreign
    try:
        cfg = omegaconf.OmegaConf.create(
            {
                "task": {"_name": "language_modeling", "tokens_per_sample": 16, "modes": [1, 2]},
                "model": SMALL | {"_name": "transformer_lm", "max_target_positions": "${task.tokens_per_sample}"},
            }
        )
        counts = collections.defaultdict(int, {"a": 1})
        extra = {"mode": BreakMode.none, "best": BreakMode, "counts": counts, "path": pathlib.PurePosixPath("a/b")}
        content = {"cfg": cfg, "model": weights(), "extra_state": extra}
        path = write(tmp_path / "omega.pt", content)
    finally:
        del sys.modules[foreign.__name__]
    raw = read_pickle(path)
    assert type(raw["cfg"]) is not type(cfg)
    assert plain(raw["extra_state"]["mode"]) == "none"
    assert raw["extra_state"]["counts"] == {"a": 1}
    loaded = load_checkpoint(path)
    assert loaded.config["task"]["modes"] == [1, 2]
    assert load_model(loaded, 12, 1).max_positions == 16


@pytest.mark.parametrize(
    ("settings", "kept", "expected"),
    [
        ({"relu_dropout": 0.3}, {}, {"activation_dropout": 0.3}),
        ({}, {"no_decoder_final_norm": True}, {"no_decoder_final_norm": True}),
        (
            {"decoder_learned_pos": True, "max_target_positions": 9},
            {"decoder_learned_pos": True, "max_target_positions": 9},
            {"max_target_positions": 9},
        ),
        (
            {"adaptive_softmax_cutoff": "4,8", "share_decoder_input_output_embed": True, "adaptive_softmax_factor": 2},
            {"adaptive_softmax_cutoff": (4, 8), "adaptive_softmax_factor": 2},
            {"adaptive_softmax_cutoff": (4, 8)},
        ),
    ],
)
def test_what_old_versions_expressed_in_other_ways(tmp_path, settings, kept, expected):
    content = {"args": argparse.Namespace(**ARGS | settings), "model": weights(**kept)}
    model = load_model(load_checkpoint(write(tmp_path / "old.pt", content)), 12, 1)
    assert {name: getattr(model.config, name) for name in expected} == expected


def test_half_precision_weights_are_read_as_float32(tmp_path):
    half = {name: value.half() for name, value in weights().items()}
    content = {"args": argparse.Namespace(**ARGS), "model": half}
    model = load_model(load_checkpoint(write(tmp_path / "half.pt", content)), 12, 1)
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no weights under 'model'"),
        ({"model": {"w": 3}}, "no weights under 'model'"),
        ({"model": {"w": torch.zeros(1)}}, "no settings"),
        ({"args": argparse.Namespace(**ARGS | {"scale_fc": True}), "model": {}}, "scale_fc=True, which is not offered"),
    ],
)
def test_what_is_no_language_model(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(write(tmp_path / "x.pt", content))


def test_a_model_of_another_task_is_read_but_not_made(tmp_path):
    args = argparse.Namespace(task="translation", arch="transformer", encoder_layers=2)
    loaded = load_checkpoint(write(tmp_path / "x.pt", {"args": args, "model": {"encoder.w": torch.zeros(1)}}))
    assert loaded.config["model"]["encoder_layers"] == 2
    with pytest.raises(ValueError, match="'transformer' for task 'translation'"):
        load_model(loaded, 12, 1)


@FORMATS
@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        ("os", "system", "touch {}"),
        ("builtins", "eval", "open({!r}, 'w')"),
        ("builtins", "exec", "open({!r}, 'w')"),
        ("subprocess", "check_output", ["touch", "{}"]),
        ("builtins", "getattr", "{}"),
        ("torch.serialization", "load", "{}"),
    ],
)
def test_no_code_is_run(tmp_path, zipped, module, name, part):
    proof = str(tmp_path / "proof")
    filled = [p.format(proof) for p in part] if isinstance(part, list) else part.format(proof)
    function = getattr(importlib.import_module(module), name)
    bad = {"args": Payload(function, filled), "model": weights()}
    path = write(tmp_path / "bad.pt", bad, zipped)
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read as a checkpoint: it asks to run .*nothing was run"):
        load_checkpoint(path)
    assert not os.path.exists(proof)


@FORMATS
def test_a_stand_in_does_nothing_with_what_it_is_given(tmp_path, zipped):
    """A class name of fairseq's does not make a payload harmless: what it would call is refused."""
    foreign = types.ModuleType("fairseq.meters")
    foreign.AverageMeter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    sys.modules["fairseq.meters"] = foreign
    try:
        meter = foreign.AverageMeter()
        meter.value = 3
        inner = write(tmp_path / "ok.pt", {"args": argparse.Namespace(**ARGS), "model": weights(), "m": meter}, zipped)
        meter.value = Payload(os.system, f"touch {tmp_path}/proof")
        bad = write(tmp_path / "bad.pt", {"m": meter}, zipped)
    finally:
        del sys.modules["fairseq.meters"]
    assert load_checkpoint(inner).config["task"]["name"] == "language_modeling"
    with pytest.raises(ValueError, match=r"(posix|os)\.system"):
        load_checkpoint(bad)
    assert not os.path.exists(tmp_path / "proof")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_bare_pickle_is_refused(tmp_path, protocol):
    path = tmp_path / "bare.pt"
    path.write_bytes(pickle.dumps(Payload(os.system, f"touch {tmp_path}/proof"), protocol))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(str(path))
    assert not os.path.exists(tmp_path / "proof")


def test_a_zip_whose_pickle_is_of_another_protocol_is_refused(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.save({"model": {}}, path)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            bad = pickle.dumps(Payload(os.system, f"touch {tmp_path}/proof"), 4)
            new.writestr(name, bad if name.endswith("data.pkl") else old.read(name))
    (tmp_path / "y.pt").write_bytes(rewritten.getvalue())
    with pytest.raises(ValueError, match=r"y\.pt cannot be read"):
        load_checkpoint(str(tmp_path / "y.pt"))
    assert not os.path.exists(tmp_path / "proof")


@FORMATS
def test_files_cut_short_or_garbled(tmp_path, zipped):
    path = write(tmp_path / "whole.pt", {"args": argparse.Namespace(**ARGS), "model": weights()}, zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 1, 10, 100, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pt cannot be read as a checkpoint: it is damaged"):
            load_checkpoint(str(tmp_path / "cut.pt"))
    (tmp_path / "text.pt").write_text("this is no checkpoint\n" * 100)
    with pytest.raises(ValueError, match="another kind of file"):
        load_checkpoint(str(tmp_path / "text.pt"))
    assert load_checkpoint(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_checkpoint(str(tmp_path / "none.pt"))
    with pytest.raises(IsADirectoryError):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("decoder.", "decoder._fsdp_wrapped_module.", 1),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.", 1),
    ],
)
def test_names_that_wrappers_gave_are_those_of_the_model(tmp_path, spell):
    plain_weights = weights()
    wrapped = {spell(name): value for name, value in plain_weights.items()}
    path = write(tmp_path / "w.pt", {"args": argparse.Namespace(**ARGS), "model": wrapped})
    loaded = load_model(load_checkpoint(path), 12, 1).state_dict()
    assert loaded.keys() == plain_weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in plain_weights.items())


def test_wrapped_names_that_cannot_be_read_are_errors(tmp_path):
    found = weights()
    twice = found | {"module.decoder.layer_norm.bias": torch.zeros(8)}
    path = write(tmp_path / "t.pt", {"args": argparse.Namespace(**ARGS), "model": twice})
    with pytest.raises(ValueError, match=r"decoder.layer_norm.bias twice, once as module\.decoder"):
        load_checkpoint(path)
    flat = {"decoder.flat_param_0": torch.zeros(9)}
    path = write(tmp_path / "f.pt", {"args": argparse.Namespace(**ARGS), "model": flat})
    with pytest.raises(ValueError, match="flattened shards of weights"):
        load_checkpoint(path)


def test_a_missing_norm_setting_has_the_default_of_the_program_that_wrote_the_file(tmp_path):
    bare = SMALL | {"_name": "transformer_lm"}
    cfg = {"task": {"_name": "language_modeling", "tokens_per_sample": 32}, "model": bare}
    for pre_norm in (False, True):
        content = {"args": None, "cfg": cfg, "model": weights(decoder_normalize_before=pre_norm)}
        loaded = load_checkpoint(write(tmp_path / "new.pt", content))
        assert loaded.written_by == "fairseq 0.12"
        assert load_model(loaded, 12, 1).config.decoder_normalize_before is pre_norm
    old = {name: value for name, value in ARGS.items() if name != "decoder_normalize_before"}
    loaded = load_checkpoint(write(tmp_path / "old.pt", {"args": argparse.Namespace(**old), "model": weights()}))
    assert loaded.written_by == "fairseq 0.9"
    assert load_model(loaded, 12, 1).config.decoder_normalize_before
