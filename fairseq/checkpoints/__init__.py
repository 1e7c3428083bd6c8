"""Checkpoints of other programs, read without running their code."""
