"""Recall of neighbours by the state that is searched: which tap, or which layer, finds the token most often."""
