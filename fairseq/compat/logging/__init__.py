"""What ``fairseq.logging`` holds: meters, metrics and progress bars."""
