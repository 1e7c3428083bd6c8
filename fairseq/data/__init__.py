"""Text as tokens, blocks and batches."""
