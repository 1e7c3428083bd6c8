"""Training of a learned combiner: cross-entropy of the mixture on neighbours that were retrieved once.

Shapes: N target tokens, M neighbours.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.memory.combiners.learned import mixture_logp, padded_to

if TYPE_CHECKING:
    from fairseq.memory.combiners.config import CombinerTrainingConfig
    from fairseq.memory.combiners.learned import ShareNetwork
    from fairseq.memory.types import Candidates

logger = logging.getLogger(__name__)

_EVALUATED_AT_ONCE = 4096


@dataclass(frozen=True)
class Examples:
    """Target tokens with their neighbours."""

    found: Candidates
    logp_N: Tensor
    """ln p of each target by the model alone."""
    target_N: Tensor
    block_N: Tensor
    """Number of the sentence each target is in."""

    def __len__(self) -> int:
        return len(self.target_N)


@dataclass(frozen=True)
class TrainingReport:
    """Losses on the held-out sentences, nats per token."""

    model_alone: float
    before: float
    """Of the network before training."""
    best: float
    epochs: int
    num_held_out: int
    seconds: float


def train_network(
    network: ShareNetwork, examples: Examples, config: CombinerTrainingConfig, seed: int
) -> TrainingReport:
    """Train in place; the network ends with the weights that were best on the held-out sentences.

    Raises: ValueError when there are too few sentences to hold some out.
    """
    started = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    train_N, held_N = split_by_sentence(examples.block_N, config.held_out, random)
    found = examples.found
    is_hit_NM = found.same_token(examples.target_N) & found.keep_NM
    network.fit_inputs(padded_to(found.rows(train_N), network.k))
    optimizer = torch.optim.Adam(network.parameters(), lr=config.rate)
    before = best = held_out_loss(network, examples, is_hit_NM, held_N)
    weights, waited, epoch = copy.deepcopy(network.state_dict()), 0, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while epoch < config.max_epoch and waited < config.patience:
            network.train()
            order_N = train_N[torch.randperm(len(train_N), generator=random)]
            for rows_N in torch.split(order_N, config.batch_tokens):
                optimizer.zero_grad()
                loss = -_logp(network, examples, is_hit_NM, rows_N).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            epoch += 1
            now = held_out_loss(network, examples, is_hit_NM, held_N)
            waited += 1
            if now < best:
                best, weights, waited = now, copy.deepcopy(network.state_dict()), 0
            logger.info("epoch %d: held-out loss %.4f nats per token (best %.4f)", epoch, now, best)
    network.load_state_dict(weights)
    network.eval()
    alone = -float(examples.logp_N[held_N].double().mean())
    return TrainingReport(alone, before, best, epoch, len(held_N), time.perf_counter() - started)


def split_by_sentence(block_N: Tensor, share: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, whole sentences each. Raises: ValueError when either would be empty."""
    sentences = torch.unique(block_N)
    count = max(1, round(share * len(sentences)))
    if count >= len(sentences):
        raise ValueError(
            f"a split of {len(sentences)} sentences is too small to hold --held-out {share} of them out; name a larger "
            "one by --valid-subset"
        )
    held = sentences[torch.randperm(len(sentences), generator=random)[:count]]
    is_held_N = torch.isin(block_N, held)
    return (~is_held_N).nonzero()[:, 0], is_held_N.nonzero()[:, 0]


@torch.no_grad()
def held_out_loss(network: ShareNetwork, examples: Examples, is_hit_NM: Tensor, rows_N: Tensor) -> float:
    """Mean loss in nats of some rows, without dropout."""
    network.eval()
    parts = [
        _logp(network, examples, is_hit_NM, part).double().sum() for part in torch.split(rows_N, _EVALUATED_AT_ONCE)
    ]
    return -float(torch.stack(parts).sum()) / len(rows_N)


def _logp(network: ShareNetwork, examples: Examples, is_hit_NM: Tensor, rows_N: Tensor) -> Tensor:
    shares = network(examples.found.rows(rows_N))
    return mixture_logp(shares, examples.logp_N[rows_N], is_hit_NM[rows_N])
