"""Evaluation of a language model on a split, with or without memory, and what it writes."""
