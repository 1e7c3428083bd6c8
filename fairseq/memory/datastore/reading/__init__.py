"""Reading stores that are larger than memory by explicit requests."""
