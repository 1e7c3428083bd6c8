"""Text continued by a language model: beam search and sampling, for the hub interface.

Shapes: H hypotheses, T tokens so far, V types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.config import flag, require_at_least

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.transformer_lm import TransformerLanguageModel


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of generated text."""

    beam: int = flag("--beam", default=5)
    """Hypotheses kept, or drawn with --sampling."""
    nbest: int = flag("--nbest", default=1)
    """Hypotheses returned."""
    max_len_b: int = flag("--max-len-b", default=200)
    """Largest number of new tokens."""
    min_len: int = flag("--min-len", default=1)
    """Smallest number of new tokens, </s> included."""
    lenpen: float = flag("--lenpen", default=1.0)
    """Power of the length that scores are divided by; larger favours long text."""
    unkpen: float = flag("--unkpen", default=0.0)
    """Taken off the score of <unk>."""
    temperature: float = flag("--temperature", default=1.0)
    """Divides the logits."""
    sampling: bool = flag("--sampling", default=False)
    """Draw tokens instead of searching."""
    sampling_topk: int = flag("--sampling-topk", default=-1)
    """Draw from the most probable types; -1 for all."""
    sampling_topp: float = flag("--sampling-topp", default=-1.0)
    """Draw from the fewest types that hold this share of the probability (arXiv 1904.09751); -1 for all."""

    def __post_init__(self) -> None:
        require_at_least(1, beam=self.beam, nbest=self.nbest, max_len_b=self.max_len_b)
        if not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature} is not above 0; --beam 1 takes the most probable token")


@dataclass(frozen=True)
class Hypothesis:
    """One text."""

    tokens: Tensor
    """int64 (T,), the beginning and </s> included."""
    logp: Tensor
    """Log-probability of each token, (T,)."""
    score: float
    """Sum of the new tokens' over their number to the power of --lenpen."""


@torch.inference_mode()
def generate(
    models: Sequence[TransformerLanguageModel], prefix: Tensor, dictionary: Dictionary, config: GenerationConfig
) -> list[Hypothesis]:
    """Continue a text, int64 (T,) without </s>; the best hypotheses first.

    The whole text is read anew for each token.
    """
    eos = dictionary.eos()
    live, logp = prefix.repeat(config.beam if config.sampling else 1, 1), _prefix_logp(models, prefix, eos)
    live_logp = logp.repeat(len(live), 1)
    done: list[Hypothesis] = []
    for step in range(1, config.max_len_b + 1):
        next_HV = _next_logp(models, live, eos, config.temperature)
        next_HV[:, [dictionary.pad(), dictionary.bos()]] = -torch.inf
        next_HV[:, dictionary.unk()] -= config.unkpen
        if step < config.min_len:
            next_HV[:, eos] = -torch.inf
        if step == config.max_len_b:
            next_HV[:, [v for v in range(next_HV.shape[1]) if v != eos]] = -torch.inf
        rows, tokens = _drawn(next_HV, config) if config.sampling else _best(next_HV, live_logp, len(prefix), config)
        chosen = next_HV[rows, tokens]
        live = torch.cat([live[rows], tokens[:, None]], 1)
        live_logp = torch.cat([live_logp[rows], chosen[:, None]], 1)
        ended = tokens == eos
        done += [_hypothesis(t, p, len(prefix), config) for t, p in zip(live[ended], live_logp[ended])]
        live, live_logp = live[~ended], live_logp[~ended]
        if not len(live) or (len(done) >= config.beam and not config.sampling):
            break
        live, live_logp = live[: config.beam], live_logp[: config.beam]
    return sorted(done, key=lambda found: -found.score)[: config.nbest]


def _inputs(tokens_HT: Tensor, eos: int) -> Tensor:
    """A text is read after </s>, as in training."""
    return torch.cat([tokens_HT.new_full((len(tokens_HT), 1), eos), tokens_HT], 1)


def _mean_logp(parts: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(parts), 0) - torch.log(torch.tensor(float(len(parts))))


def _next_logp(models: Sequence[TransformerLanguageModel], live_HT: Tensor, eos: int, temperature: float) -> Tensor:
    """Log-probability of the next token, (H, V)."""
    parts = [model.vocab_logp(model(_inputs(live_HT, eos)).hidden_BTD[:, -1]) for model in models]
    return _mean_logp([torch.log_softmax(logp_HV / temperature, 1) for logp_HV in parts])


def _prefix_logp(models: Sequence[TransformerLanguageModel], prefix: Tensor, eos: int) -> Tensor:
    """Log-probability of each token of the beginning, (T,)."""
    if not len(prefix):
        return torch.empty(0, device=prefix.device)
    inputs = _inputs(prefix[None, :-1], eos)
    return _mean_logp([model.target_logp(model(inputs).hidden_BTD[0], prefix)[0] for model in models])


def _best(next_HV: Tensor, logp_HT: Tensor, first: int, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Rows and tokens of the best continuations; twice as many as are kept, since some end."""
    total_HV = logp_HT[:, first:].sum(1, keepdim=True) + next_HV
    count = min(2 * config.beam if config.beam > 1 else 1, int(torch.isfinite(total_HV).sum()))
    place = total_HV.flatten().topk(count).indices
    rows = torch.div(place, next_HV.shape[1], rounding_mode="floor")
    return rows, place % next_HV.shape[1]


def _drawn(next_HV: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Every row and a token drawn for it."""
    sorted_HV, types_HV = next_HV.softmax(1).sort(1, descending=True)
    if config.sampling_topk > 0:
        sorted_HV[:, config.sampling_topk :] = 0
    if config.sampling_topp > 0:
        sorted_HV[sorted_HV.cumsum(1) - sorted_HV >= config.sampling_topp] = 0
    place = torch.multinomial(sorted_HV, 1)
    return torch.arange(len(next_HV), device=next_HV.device), types_HV.gather(1, place)[:, 0]


def _hypothesis(tokens: Tensor, logp: Tensor, first: int, config: GenerationConfig) -> Hypothesis:
    return Hypothesis(tokens, logp, float(logp[first:].sum()) / (len(tokens) - first) ** config.lenpen)
