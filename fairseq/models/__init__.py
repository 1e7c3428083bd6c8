"""Models: text in, hidden states, memory keys and log-probabilities out."""
