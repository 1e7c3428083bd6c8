"""Models: text in, hidden states, memory keys and log-probabilities out."""

from fairseq.fairseq_names import lazy

__getattr__, __dir__ = lazy(__name__)
