"""Perplexity, losses per word and the figures of training."""

from fairseq.fairseq_names import lazy

__getattr__, __dir__ = lazy(__name__)
