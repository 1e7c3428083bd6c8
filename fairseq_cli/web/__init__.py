"""Commands that answer on a network address."""
