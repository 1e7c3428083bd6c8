"""Building blocks of models, with fairseq's parameter names."""

from fairseq.fairseq_names import lazy

__getattr__, __dir__ = lazy(__name__)
