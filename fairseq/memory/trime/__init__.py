"""TRIME's joint loss over vocabulary and memory, in memory linear in the tokens."""
