"""A decoder of transformers that learns the neighbours' distributions (Memory Decoder, arXiv 2508.09874).

    python transformers_decoder.py train TARGETS.arrow FOLDER --types 5000
    python transformers_decoder.py score DATA/valid FOLDER --out valid.npz

The targets' file holds the text too (its labels), so that training needs nothing else.

Shapes: B blocks, T tokens of a block, M entries of the largest distribution, V types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from fairseq.config import FlagParser, build, flag, require_at_least, require_within
from fairseq.criterions.memory_decoder_loss import divergence
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.memory.retrieval.soft_targets import SoftTargets
from fairseq.registry import lookup
from fairseq.runtime.atomic_files import writing
from fairseq_cli.entry import run

EOS = 2  # of fairseq's dictionaries; it stands before a text


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT-2 on targets of fairseq-datastore export-knn-targets."""

    paths: tuple[str, ...] = flag("paths")
    """File of targets, and folder for the model."""
    types: int = flag("--types", default=0)
    """Types of the dictionary."""
    width: int = flag("--width", default=96)
    """Width of the model."""
    layers: int = flag("--layers", default=2)
    """Its layers."""
    block: int = flag("--block", default=128)
    """Tokens of a block."""
    batch: int = flag("--batch", default=8)
    """Blocks of an update."""
    updates: int = flag("--updates", default=480)
    """Updates."""
    rate: float = flag("--lr", default=0.004)
    """Largest learning rate."""
    alpha: float = flag("--knn-alpha", default=0.5)
    """Share of the divergence in the loss."""
    seed: int = flag("--seed", default=1)
    """Seed of weights and order."""

    def __post_init__(self) -> None:
        if len(self.paths) != 2:
            raise ValueError(f"{len(self.paths)} paths are named; give the file of targets and the folder to write")
        require_at_least(
            1, types=self.types, width=self.width, block=self.block, batch=self.batch, updates=self.updates
        )
        require_within(0, 1, knn_alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a binarised split, each token once, as eval_lm.py does with the same blocks."""

    paths: tuple[str, ...] = flag("paths")
    """Prefix of the split (DATA/valid), and folder of the model."""
    block: int = flag("--block", default=128)
    """Tokens that are scored at once."""
    context: int = flag("--context", default=64)
    """Tokens before them that are read."""
    out: str = flag("--out", default="")
    """NumPy file for the log-probabilities."""

    def __post_init__(self) -> None:
        if len(self.paths) != 2 or not self.out:
            raise ValueError("give the prefix of the split, the folder of the model, and --out FILE")
        require_at_least(1, block=self.block)
        require_at_least(0, context=self.context)


class TargetBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of a text with the distribution at each token."""

    def __init__(self, targets: SoftTargets, block: int) -> None:
        self.targets, self.block = targets, block
        self._tokens = np.concatenate([[EOS], targets.labels]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets) // self.block

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        place_T = np.arange(number * self.block, (number + 1) * self.block)
        token_TM, prob_TM = self.targets.rows(place_T)
        arrays = {"input_ids": self._tokens[place_T], "labels": self._tokens[place_T + 1]}
        return {
            name: torch.from_numpy(array) for name, array in (arrays | {"token": token_TM, "prob": prob_TM}).items()
        }


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch; distributions are padded with entries of probability 0."""
    width = max(row["token"].shape[1] for row in rows)
    padded = [
        row | {name: torch.nn.functional.pad(row[name], (0, width - row[name].shape[1])) for name in ("token", "prob")}
        for row in rows
    ]
    return {name: torch.stack([row[name] for row in padded]) for name in padded[0]}


class DistillingTrainer(Trainer):
    """Trains by ``a KL(p_kNN || p) + (1 - a) (-log p(token))``, both means over tokens."""

    alpha = 0.5

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """See the class."""
        out = model(input_ids=inputs["input_ids"])
        logp_BTV = torch.log_softmax(out.logits, 2)
        nll = -logp_BTV.gather(2, inputs["labels"][:, :, None]).sum()
        kl = divergence(inputs["prob"].flatten(0, 1), logp_BTV.gather(2, inputs["token"]).flatten(0, 1))
        loss = (self.alpha * kl + (1 - self.alpha) * nll) / inputs["labels"].numel()
        return (loss, out) if return_outputs else loss


def train(config: TrainConfig) -> None:
    """Train, and save the model."""
    targets = SoftTargets.open(config.paths[0])
    if int(targets.labels.max(initial=0)) >= config.types:
        raise ValueError(
            f"{targets.path} holds token {targets.labels.max()}, --types says {config.types}; give its own"
        )
    set_seed(config.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.types, n_positions=2 * config.block, n_embd=config.width, n_layer=config.layers, n_head=4,
            bos_token_id=EOS, eos_token_id=EOS,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=config.paths[1], max_steps=config.updates, per_device_train_batch_size=config.batch, use_cpu=True,
        learning_rate=config.rate, lr_scheduler_type="linear", warmup_steps=30, adam_beta2=0.98, max_grad_norm=0.1,
        save_strategy="no", report_to=[], logging_steps=100, seed=config.seed, remove_unused_columns=False,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillingTrainer(
        model, arguments, train_dataset=TargetBlocks(targets, config.block), data_collator=collate
    )
    trainer.alpha = config.alpha
    trainer.train()
    model.save_pretrained(config.paths[1])


@torch.inference_mode()
def score(config: ScoreConfig) -> None:
    """Write ``logp``, the log-probability of every token in its order."""
    tokens = np.asarray(MMapIndexedDataset(config.paths[0]).tokens).astype(np.int64)
    model = GPT2LMHeadModel.from_pretrained(config.paths[1]).eval()
    text_N, parts = torch.from_numpy(np.concatenate([[EOS], tokens])), []
    for first in range(0, len(tokens), config.block):
        start, end = max(0, first - config.context), min(first + config.block, len(tokens))
        logp_TV = torch.log_softmax(model(text_N[None, start:end]).logits[0, first - start :], 1)
        parts.append(logp_TV.gather(1, text_N[first + 1 : end + 1, None])[:, 0])
    with writing(config.out, binary=True) as file:
        np.savez(file, logp=torch.cat(parts).numpy().astype(np.float64))


COMMANDS = {"train": (TrainConfig, train), "score": (ScoreConfig, score)}


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names."""
    name, *words = argv or [""]
    kind, command = lookup(COMMANDS, name, "command")
    parser = FlagParser(f"transformers_decoder.py {name}", kind.__doc__ or "")
    parser.add_config(kind)
    command(build(kind, parser.parse(words)))


if __name__ == "__main__":
    run("transformers_decoder.py", main)
