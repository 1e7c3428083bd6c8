"""Retrieval results on disk: neighbours of every scored token, kept once and evaluated under many settings."""
