"""Meters, metrics and progress bars under the names of ``fairseq.logging``."""
