"""Plug-ins written for fairseq train here: losses, sizes, a model, an optimizer, a schedule, a task."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint, load_model, vocabulary_size
from fairseq.criterions import CRITERIONS
from fairseq.models.architectures import ARCHITECTURES, MODELS, build_model_config
from fairseq.optim import LR_SCHEDULERS, OPTIMIZERS
from fairseq.tasks import TASKS
from fairseq_cli import train

PLUGIN = """
import math
from dataclasses import dataclass, field

import torch
from torch.optim import SGD

from fairseq import metrics, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from fairseq.optim import LegacyFairseqOptimizer, register_optimizer
from fairseq.optim.lr_scheduler import LegacyFairseqLRScheduler, register_lr_scheduler
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask


@register_criterion("focal_loss")
class FocalLoss(FairseqCriterion):
    def __init__(self, task, focus):
        super().__init__(task)
        self.focus = focus

    @staticmethod
    def add_args(parser):
        parser.add_argument("--focus", default=1.0, type=float, metavar="F", help="share of hard words")

    def forward(self, model, sample, reduce=True):
        out = model(**sample["net_input"])
        logp = model.get_normalized_probs(out, log_probs=True)
        target = model.get_targets(sample, out)
        nll = -logp.gather(2, target[:, :, None])[:, :, 0]
        kept = target.ne(self.padding_idx)
        nll = nll[kept]
        loss = ((1 - (-nll).exp()) ** self.focus * nll).sum()
        log = {"loss": loss.data, "nll_loss": nll.sum().data, "ntokens": sample["ntokens"]}
        log |= {"nsentences": sample["target"].size(0), "sample_size": sample["ntokens"]}
        return loss, sample["ntokens"], log

    @staticmethod
    def reduce_metrics(logging_outputs):
        nll = sum(log["nll_loss"] for log in logging_outputs)
        ntokens = sum(log["ntokens"] for log in logging_outputs)
        metrics.log_scalar("nats", nll / ntokens, ntokens, round=4)
        metrics.log_derived("twice", lambda meters: 2 * meters["nats"].avg)


@dataclass
class MeanConfig(FairseqDataclass):
    mean_factor: float = field(default=3.0, metadata={"help": "factor of the mean"})


@register_criterion("mean_loss", dataclass=MeanConfig)
class MeanLoss(FairseqCriterion):
    def __init__(self, cfg, task):
        super().__init__(task)
        self.factor = cfg.mean_factor

    def forward(self, model, sample, reduce=True):
        features = model(**sample["net_input"])[0]
        loss = self.factor * features.float().pow(2).mean()
        return loss, 1, {"loss": loss.data, "ntokens": 1, "nsentences": 1, "sample_size": 1}


@register_model_architecture("transformer_lm", "plugin_tiny")
def plugin_tiny(args):
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 8)
    args.decoder_ffn_embed_dim = getattr(args, "decoder_ffn_embed_dim", 2 * args.decoder_embed_dim)
    args.decoder_layers = getattr(args, "decoder_layers", 1)
    args.decoder_attention_heads = getattr(args, "decoder_attention_heads", 2)
    base_lm_architecture(args)


@register_model("loud_lm")
class LoudLM(TransformerLanguageModel):
    def forward(self, tokens, key_tap=None, incremental_state=None):
        return super().forward(tokens, key_tap, incremental_state)


@register_model_architecture("loud_lm", "loud_tiny")
def loud_tiny(args):
    plugin_tiny(args)


@register_optimizer("plain_sgd")
class PlainSGD(LegacyFairseqOptimizer):
    def __init__(self, args, params):
        super().__init__(args)
        self._optimizer = SGD(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser):
        parser.add_argument("--plain-momentum", type=float, default=0.0)
        parser.add_argument("--plain-nesterov", action="store_true")

    @property
    def optimizer_config(self):
        return {"lr": self.args.lr[0], "momentum": self.args.plain_momentum, "nesterov": self.args.plain_nesterov}


@register_lr_scheduler("halving")
class Halving(LegacyFairseqLRScheduler):
    @staticmethod
    def add_args(parser):
        parser.add_argument("--halve-every", type=int, default=1)

    def step_update(self, num_updates):
        self.optimizer.set_lr(self.args.lr[0] / 2 ** (num_updates // self.args.halve_every))
        return self.optimizer.get_lr()


@register_task("backwards_lm")
class BackwardsLM(LanguageModelingTask):
    @staticmethod
    def add_args(parser):
        parser.add_argument("--every-other", action="store_true")

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        super().load_dataset(split, epoch=epoch, combine=combine)
        self.datasets[split] = Reversed(self.datasets[split], self.args.every_other)


class Reversed:
    def __init__(self, blocks, every_other):
        self.blocks, self.numbers = blocks, range(len(blocks))[:: -2 if every_other else -1]
        self.sizes = blocks.sizes[list(self.numbers)]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.numbers[i]

    def collater(self, rows):
        batch = self.blocks.collate(rows)
        return {"id": batch.ids_B, "net_input": {"src_tokens": batch.tokens_BT}, "target": batch.target_BT}
"""
TABLES = (CRITERIONS, ARCHITECTURES, MODELS, OPTIMIZERS, LR_SCHEDULERS, TASKS)
BASE = (
    "--arch plugin_tiny --tokens-per-sample 16 --max-sentences 40 --max-update 2 --cpu --log-format json "
    "--log-interval 1 --seed 3 --num-workers 0 --lr 0.25"
).split()


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    before, modules = [dict(table) for table in TABLES], set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("fairseq_form"):
            del sys.modules[name]
    for table, content in zip(TABLES, before):
        table.clear()
        table.update(content)


@pytest.fixture
def run(data_bin, tmp_path, caplog):
    """Train two updates with the plug-in; returns the last checkpoint and the validation's line."""
    plugin = tmp_path / "fairseq_form_plugin.py"
    plugin.write_text(PLUGIN)
    caplog.set_level("INFO")

    def train_with(*words):
        caplog.clear()
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        words = [str(word) for word in words]
        train.main([str(data_bin), "--user-dir", str(plugin), "--save-dir", str(save_dir), *BASE, *words])
        lines = [json.loads(r.message) for r in caplog.records if r.name == "valid" and r.message.startswith("{")]
        return load_checkpoint(str(save_dir / "checkpoint_last.pt")), lines[-1]

    return train_with


def test_a_loss_with_add_args_and_reduce_metrics_trains_and_reports(run):
    plain, told = run("--criterion", "focal_loss", "--focus", 0, "--optimizer", "sgd")
    assert told["valid_nats"] == pytest.approx(told["valid_nll_loss"] * 0.693147, abs=1e-3)
    assert told["valid_twice"] == pytest.approx(2 * told["valid_nats"], abs=1e-3)
    reference, figures = run("--criterion", "cross_entropy", "--optimizer", "sgd")
    assert figures["valid_loss"] == told["valid_nll_loss"]
    torch.testing.assert_close(plain.model, reference.model, rtol=0, atol=1e-6)
    focused, _ = run("--criterion", "focal_loss", "--focus", 2, "--optimizer", "sgd")
    assert not torch.equal(focused.model["decoder.layers.0.fc1.weight"], plain.model["decoder.layers.0.fc1.weight"])


def test_a_loss_with_a_dataclass_trains(run):
    checkpoint, told = run("--criterion", "mean_loss", "--mean-factor", 5, "--optimizer", "sgd")
    assert checkpoint.config["given"]["mean_factor"] == 5.0
    assert told["valid_loss"] > 0


def test_an_architecture_reads_what_the_user_gave(run):
    checkpoint, _ = run("--optimizer", "sgd", "--decoder-embed-dim", 12)
    assert checkpoint.model["decoder.layers.0.fc1.weight"].shape == (24, 12)
    assert build_model_config("plugin_tiny", {}).decoder_ffn_embed_dim == 16


def test_a_model_of_a_plug_in_is_loaded_as_such(run):
    checkpoint, _ = run("--optimizer", "sgd", "--arch", "loud_tiny")
    assert checkpoint.config["model"]["kind"] == "loud_lm"
    assert type(load_model(checkpoint, vocabulary_size(checkpoint.model), 1)).__name__ == "LoudLM"
    del MODELS["loud_lm"]
    with pytest.raises(ValueError, match="'loud_lm' is a plug-in's; give the --user-dir"):
        load_model(checkpoint, vocabulary_size(checkpoint.model), 1)


def test_an_optimizer_and_a_schedule_train_as_ours(run):
    flags = ("--plain-momentum", 0.9, "--plain-nesterov")
    theirs, _ = run("--optimizer", "plain_sgd", *flags, "--lr-scheduler", "halving", "--halve-every", 1)
    assert theirs.scheduler["rate"] == 0.0625
    steady, _ = run("--optimizer", "plain_sgd", "--plain-momentum", 0.9)
    ours, _ = run("--optimizer", "sgd", "--momentum", 0.9)
    torch.testing.assert_close(steady.model, ours.model, rtol=0, atol=1e-6)


def test_a_task_with_load_dataset_serves_its_blocks(run):
    _, every = run("--optimizer", "sgd", "--task", "backwards_lm")
    _, half = run("--optimizer", "sgd", "--task", "backwards_lm", "--every-other")
    _, plain = run("--optimizer", "sgd")
    assert every["valid_loss"] == pytest.approx(plain["valid_loss"], abs=0.05)  # the same blocks in other batches
    assert (half["valid_bsz"], every["valid_bsz"], plain["valid_bsz"]) == (22.0, 21.5, 21.5)  # of 43 blocks


@pytest.mark.parametrize(
    ("decorator", "module"),
    [("register_criterion", "criterions"), ("register_optimizer", "optim"), ("register_task", "tasks")],
)
def test_a_class_of_no_known_form_is_rejected_with_the_way_out(decorator, module):
    register = getattr(__import__(f"fairseq.{module}", fromlist=[decorator]), decorator)
    with pytest.raises(ValueError, match="derive it from"):
        register("nothing_known")(type("Nothing", (), {}))


def test_an_option_of_another_kind_is_rejected(tmp_path: Path):
    from fairseq.compat.flags import config_of

    class Odd:
        @staticmethod
        def add_args(parser):
            parser.add_argument("--odd", action="append")

    with pytest.raises(ValueError, match="action store or store_true"):
        config_of(Odd, None)
