"""Commands about memories and the ways to combine them with a model."""
