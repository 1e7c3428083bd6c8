"""Batches of ours as fairseq's samples, and models as fairseq's code calls them.

Shapes: B blocks, T positions, V types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.data.types import LMBatch

if TYPE_CHECKING:
    from fairseq.models.transformer_lm import TransformerLanguageModel

Sample = dict[str, Any]


def as_sample(batch: LMBatch, pad: int) -> Sample:
    """A batch as the dictionary that fairseq's data sets make; positions that are not scored have the target pad."""
    target_BT = batch.target_BT.masked_fill(~batch.scored_BT, pad)
    lengths_B = (batch.tokens_BT != pad).sum(1)
    return {
        "id": batch.ids_B,
        "nsentences": len(batch.ids_B),
        "ntokens": batch.num_scored,
        "net_input": {"src_tokens": batch.tokens_BT, "src_lengths": lengths_B},
        "target": target_BT,
    }


def as_batch(sample: Sample, pad: int) -> LMBatch:
    """A sample of fairseq as a batch; every target but pad is scored."""
    target_BT = sample["target"]
    ids_B = torch.as_tensor(sample.get("id", range(len(target_BT))))
    return LMBatch(ids_B, sample["net_input"]["src_tokens"], target_BT, target_BT != pad)


class FairseqModel(nn.Module):
    """A language model with the calls of fairseq's models; everything else is the model's own."""

    def __init__(self, model: TransformerLanguageModel) -> None:
        super().__init__()
        self.wrapped = model
        self.training = model.training

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None, **more: object) -> tuple[Tensor, Any]:
        """Scores of the types (B, T, V), of an adaptive softmax its inputs, and the states they are made of.

        Raises: ValueError for an input that models here do not read.
        """
        if more:
            raise ValueError(f"the model reads src_tokens, it was given {', '.join(more)}; leave that out")
        hidden_BTD = self.wrapped(src_tokens).hidden_BTD
        output = self.wrapped.decoder.output_projection
        scores = hidden_BTD if output is None else output(hidden_BTD)
        return scores, {"inner_states": [hidden_BTD.transpose(0, 1)], "features": hidden_BTD}

    def get_normalized_probs(self, net_output: tuple[Tensor, Any], log_probs: bool, sample: Any = None) -> Tensor:
        """(Log-)probability of every type, (B, T, V) in float32."""
        hidden_BTD = net_output[1]["features"]
        logp_BTV = self.wrapped.vocab_logp(hidden_BTD.flatten(0, 1)).view(*hidden_BTD.shape[:2], -1)
        return logp_BTV if log_probs else logp_BTV.exp()

    def get_targets(self, sample: Sample, net_output: Any) -> Tensor:
        """The targets of a sample, (B, T)."""
        target: Tensor = sample["target"]
        return target

    def max_positions(self) -> int:
        """Longest input the model is made for."""
        return int(self.wrapped.max_positions)

    def state_dict(self, *places: Any, **more: Any) -> Any:
        """The model's own."""
        return self.wrapped.state_dict(*places, **more)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the model's own weights."""
        return self.wrapped.load_state_dict(state_dict, strict, assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)
