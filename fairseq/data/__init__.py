"""Text as tokens, blocks and batches."""

from fairseq.fairseq_names import lazy

__getattr__, __dir__ = lazy(__name__)
