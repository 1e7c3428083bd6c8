"""Memories of language models: where candidates come from, how they are searched and how they are scored."""
