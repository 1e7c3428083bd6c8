"""train.py with weights spread over two processes, against one process that holds everything."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, Command
from loss_curves import recording, require_same_curve

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint
from fairseq.checkpoints.parts import FOLDER
from fairseq.runtime.config import DistributedConfig

SHORT = [*TINY_MODEL, "--log-format", "simple", "--no-epoch-checkpoints"]
EXTERNAL = ["--criterion", "trime_ext_loss", "--gather-grad"]


def losses(folder: Path) -> float:
    """Loss on valid at the end of a run, in bits."""
    return float(json.loads((folder / "train.run.json").read_text())["figures"]["valid"]["loss"])


def largest_gap(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference between the moments of two runs."""
    states = [checkpoint.optimizer["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    return max(
        (states[0][number][name] - states[1][number][name]).abs().max().item()
        for number, entries in states[0].items()
        for name in entries
    )


@pytest.fixture(scope="module")
def one(data_bin: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty updates of two batches each, in one process."""
    folder = tmp_path_factory.mktemp("one")
    words = [data_bin, *SHORT, *recording(folder), "--save-dir", folder, "--max-update", "20", "--update-freq", "2"]
    command("train.py", *words)
    return folder


def test_spread_weights_are_trained_as_whole_ones_and_resumed_by_any_process(
    one: Path, two_ranks, data_bin: Path, command: Command, tmp_path: Path
):
    words = [data_bin, *SHORT, *recording(tmp_path / "fsdp"), "--save-dir", tmp_path / "fsdp"]
    two_ranks(*words, "--max-update", "10", "--ddp-backend", "fully_sharded", "--use-sharded-state")
    parts = list((tmp_path / "fsdp" / FOLDER).glob("*/part*.pt"))
    assert sorted(part.name for part in parts) == ["part0.pt", "part1.pt"]
    shutil.copytree(tmp_path / "fsdp", tmp_path / "ten")
    command("train.py", *words, "--max-update", "20", "--update-freq", "2")  # one process takes the parts up
    assert not list((tmp_path / "fsdp" / FOLDER).iterdir())  # its checkpoints are whole, and no part is left over
    shutil.copytree(tmp_path / "ten", tmp_path / "again")
    words = [data_bin, *SHORT, *recording(tmp_path / "again"), "--save-dir", tmp_path / "again"]
    two_ranks(*words, "--max-update", "20", "--strategy", "fsdp")
    expected = load_checkpoint(str(one / "checkpoint_last.pt"), whole=True)
    for folder in (tmp_path / "fsdp", tmp_path / "again"):
        require_same_curve(one, folder)
        assert losses(folder) == pytest.approx(losses(one), abs=1e-5)
        found = load_checkpoint(str(folder / "checkpoint_last.pt"), whole=True)
        assert largest_gap(found, expected) < 1e-5
        assert found.progress["num_updates"] == 20


def test_a_checkpoint_in_parts_is_evaluated_as_a_whole_one_and_named_when_a_part_is_wrong(
    two_ranks, data_bin: Path, command: Command, tmp_path: Path
):
    said = {}
    for name, more in (("whole", []), ("parts", ["--use-sharded-state"])):
        folder = tmp_path / name
        two_ranks(
            data_bin, *SHORT, "--save-dir", folder, "--max-update", "3", "--strategy", "fsdp", "--store-ema", *more
        )
        done = command("eval_lm.py", data_bin, "--path", folder / "checkpoint_best.pt", "--cpu")
        said[name] = done.stdout + done.stderr
    perplexity = [line.partition("Perplexity")[2] for text in said.values() for line in text.splitlines()]
    found = [entry for entry in perplexity if entry]
    assert len(found) == 2
    assert found[0] == found[1]
    whole, parts = (load_checkpoint(str(tmp_path / name / "checkpoint_last.pt"), whole=True) for name in said)
    for name, value in whole.progress["ema"].items():
        torch.testing.assert_close(parts.progress["ema"][name], value, rtol=0, atol=0)
    first, second = sorted((tmp_path / "parts" / FOLDER).glob("*/part*.pt"))
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match=rf"is in parts, and .*part1\.pt is missing; copy the folder {FOLDER}"):
        load_checkpoint(str(tmp_path / "parts" / "checkpoint_last.pt"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"part1\.pt is part 0 of update3-\w+, not part 1 of update3-"):
        load_checkpoint(str(tmp_path / "parts" / "checkpoint_last.pt"))
    second.write_bytes(kept[:-100] + bytes(100))
    with pytest.raises(ValueError, match="part1"):
        load_checkpoint(str(tmp_path / "parts" / "checkpoint_last.pt"))


def test_memories_of_other_processes_are_the_same_under_spread_weights(two_ranks, data_bin: Path, tmp_path: Path):
    for name in ("ddp", "fsdp"):
        words = [*SHORT, *EXTERNAL, "--save-dir", tmp_path / name, "--max-update", "8", "--strategy", name]
        two_ranks(data_bin, *words)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-5)
    checkpoints = [load_checkpoint(str(tmp_path / name / "checkpoint_last.pt"), whole=True) for name in ("ddp", "fsdp")]
    assert largest_gap(*checkpoints) < 1e-5


def test_translation_with_spread_weights_validates_by_generating(
    two_ranks, corpus: Path, command: Command, tmp_path: Path
):
    for name in ("train", "valid"):
        lines = (corpus / f"{name}.txt").read_text().splitlines()[:60]
        for language in ("xx", "yy"):  # the translation is the sentence itself
            (tmp_path / f"{name}.{language}").write_text("\n".join(lines) + "\n")
    prefixes = [f"--{name}pref={tmp_path / name}" for name in ("train", "valid")]
    words = ["--source-lang", "xx", "--target-lang", "yy", "--joined-dictionary", "--destdir", tmp_path / "bin"]
    command("preprocess.py", *words, *prefixes)
    words = "--arch transformer_tiny --encoder-layers 1 --decoder-layers 1 --share-all-embeddings --optimizer adam"
    words += " --lr 0.01 --max-tokens 200 --max-update 8 --eval-bleu --eval-tokenized-bleu --cpu --no-progress-bar"
    bleu = ["--eval-bleu-args", '{"beam": 2, "max_len_b": 3}', "--best-checkpoint-metric", "bleu"]
    rest = ["--num-workers", "0", "--maximize-best-checkpoint-metric", "--eval-bleu-print-samples"]
    figures, written = [], []
    for name in ("ddp", "fsdp"):
        more = [*bleu, *rest, "--strategy", name, "--save-dir", tmp_path / name, "--task", "translation"]
        said = two_ranks(tmp_path / "bin", *words.split(), *more)
        written.append(re.findall("example hypothesis: (.*)", said))
        figures.append(json.loads((tmp_path / name / "train.run.json").read_text())["figures"]["valid"])
    whole, spread = figures
    assert spread["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert spread["bleu"] == pytest.approx(whole["bleu"], abs=1e-6)
    assert written[0] == written[1]
    assert any(written[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_trained_as_whole_weights_are(stage: int, one: Path, two_ranks, data_bin: Path, tmp_path: Path):
    pytest.importorskip("deepspeed")
    for updates in ("10", "20"):
        words = [*SHORT, *recording(tmp_path), "--save-dir", tmp_path, "--max-update", updates]
        two_ranks(data_bin, *words, "--strategy", f"deepspeed_stage_{stage}")
    require_same_curve(one, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(one), abs=1e-5)
    checkpoints = [load_checkpoint(str(path / "checkpoint_last.pt"), whole=True) for path in (one, tmp_path)]
    assert largest_gap(*checkpoints) < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "fsdp", "--optimizer", "adafactor"], "--optimizer adafactor with --strategy fsdp: its row"),
        (["--strategy", "fsdp", "--decoder-layerdrop", "0.2"], "--decoder-layerdrop with --strategy fsdp: processes"),
        (["--strategy", "fsdp", "--fp16"], "--fp16 with --strategy fsdp: the loss scale needs whole gradients"),
        (["--strategy", "deepspeed_stage_3", "--store-ema"], "--store-ema with --strategy deepspeed_stage_3"),
        (["--strategy", "ddp", "--use-sharded-state"], "--use-sharded-state belongs to --strategy fsdp, not ddp"),
        (["--cpu-offload"], "--cpu-offload belongs to --strategy fsdp or deepspeed_..., not auto"),
        (
            ["--strategy", "deepspeed_stage_2", "--ddp-backend", "fully_sharded"],
            "--ddp-backend fully_sharded means --strategy fsdp, but --strategy deepspeed_stage_2 was given",
        ),
    ],
)
def test_what_cannot_be_spread_is_told(
    words: list[str], message: str, data_bin: Path, command: Command, tmp_path: Path
):
    said = command("train.py", data_bin, *SHORT, "--save-dir", tmp_path, "--max-update", "1", *words, expect=2).stderr
    assert message in said.splitlines()[-1]
    assert not (tmp_path / "checkpoint_last.pt").exists()


def test_a_missing_deepspeed_is_told_in_one_line(data_bin: Path, command: Command, tmp_path: Path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('no accelerator\\nmore lines')\n")
    words = ["--save-dir", tmp_path / "out", "--max-update", "1", "--strategy", "deepspeed_stage_2"]
    user_dir = tmp_path / "plugin.py"
    user_dir.write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n")
    said = command("train.py", data_bin, *SHORT, *words, "--user-dir", user_dir, expect=2).stderr
    assert "deepspeed_stage_2: DeepSpeed cannot be imported (no accelerator); install it" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "strategy", "stage"),
    [
        ({}, "auto", 0),
        ({"ddp_backend": "no_c10d"}, "auto", 0),
        ({"ddp_backend": "fully_sharded"}, "fsdp", 0),
        ({"strategy": "ddp", "ddp_backend": "c10d"}, "ddp", 0),
        ({"strategy": "deepspeed_stage_1"}, "deepspeed_stage_1", 1),
    ],
)
def test_fairseqs_spelling_of_the_strategy(given: dict[str, str], strategy: str, stage: int):
    config = DistributedConfig(**given)
    assert (config.effective_strategy, config.zero_stage) == (strategy, stage)
