"""Choice of the next token as ``generate`` makes it: greedy, or sampled by a generator of the sequence's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SamplingSettings:
    """Options of one sequence. What the generation config of the model sets besides (such as a repetition penalty)
    holds too."""

    temperature: float = 1.0
    """Divides the log-probabilities; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    seed: int | None = None
    """Of the random numbers; None for a new one each time."""

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is taken."""
        return self.temperature == 0.0

    def of_choice(self, number: int) -> SamplingSettings:
        """Those of one of several continuations: the next one has the next seed."""
        return self if self.seed is None or not number else replace(self, seed=self.seed + number)


class TokenSampler:
    """Chooses the tokens of one sequence, as ``model.generate`` does for a batch of this sequence alone.

    With a seed the tokens are those of ``torch.manual_seed(seed)`` followed by ``model.generate(ids, do_sample=True,
    temperature=..., top_p=..., top_k=0)``; ``top_k`` is that of the model's generation config where it has one.
    """

    def __init__(self, model: PreTrainedModel, settings: SamplingSettings, num_prompt: int) -> None:
        """Args.

        model: whose generation config holds.
        num_prompt: tokens of the prompt.
        """
        self.is_greedy = settings.is_greedy
        self._processors, self.end_tokens = _processors(model, settings, num_prompt)
        self._generator: torch.Generator | None = None
        if not settings.is_greedy:
            self._generator = torch.Generator(model.device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)

    @property
    def takes_highest(self) -> bool:
        """True if the token is the argmax of the scores as they are, whatever came before."""
        return self.is_greedy and not self._processors

    def choose(self, scores_V: Tensor, ids: list[int]) -> int:
        """The next token, given the scores of the vocabulary and the tokens so far, prompt included."""
        scores_1V = scores_V.float()[None].clone()
        if self._processors:
            scores_1V = self._processors(torch.tensor([ids], device=scores_V.device), scores_1V)
        if self.is_greedy:
            return int(scores_1V.argmax())
        share_1V = torch.softmax(scores_1V, dim=-1)
        return int(torch.multinomial(share_1V, 1, generator=self._generator))


def _processors(model: Any, settings: SamplingSettings, num_prompt: int) -> tuple[Any, frozenset[int]]:
    """What ``generate`` applies to the scores, and the tokens that end a sequence."""
    from transformers import GenerationConfig

    given: dict[str, Any] = {"do_sample": not settings.is_greedy}
    if not settings.is_greedy:
        # generate's own default would be the 50 likeliest tokens, which no client of this form expects.
        top_k = getattr(model.generation_config, "top_k", None) or 0
        given |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": top_k}
    config, _ = model._prepare_generation_config(GenerationConfig(**given))  # type: ignore[no-untyped-call]
    model._prepare_special_tokens(config, True, device=model.device)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=num_prompt,
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        logits_processor=[],
        device=model.device,
    )
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return processors, frozenset(int(token) for token in ends)
