"""Token-by-token decoding of sequences that join and leave a batch between steps."""
