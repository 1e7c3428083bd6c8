"""Perplexity, losses per word and the figures of training."""
