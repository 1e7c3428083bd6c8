"""A bug of TRIME's evaluation, kept because the published perplexities contain it: one type of each tail is padding.

A tail numbers its types from 0, and the loss that TRIME evaluates with leaves out targets whose number is that of the
dictionary's padding, which is 1: of the second type of every tail only the tail's own probability is counted.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from fairseq.modules.adaptive_softmax import pick

if TYPE_CHECKING:
    from fairseq.models.base import LanguageModel

logger = logging.getLogger(__name__)


def replicate_tail_padding_bug(model: LanguageModel, hidden_ND: Tensor, target_N: Tensor, logp_N: Tensor) -> Tensor:
    """The log-probabilities with those types scored as TRIME scores them, (N,); a plain softmax has none of them."""
    if not model.has_adaptive_softmax:
        return logp_N
    softmax = model.decoder.adaptive_softmax
    for tail, (start, end) in enumerate(zip(softmax.ends, softmax.ends[1:])):
        if start + model.pad >= end:  # the type of that number belongs to the next tail
            continue
        here = (target_N == start + model.pad).nonzero().squeeze(1)
        if len(here):
            logger.debug("%d targets %d scored by their tail alone (--fix-tail-pads)", len(here), start + model.pad)
            entry = target_N.new_full((len(here),), softmax.ends[0] + tail)
            logp_N = logp_N.index_copy(0, here, pick(softmax.head(hidden_ND[here]), entry)[0].to(logp_N.dtype))
    return logp_N
