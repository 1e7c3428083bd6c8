"""Proofs beside a figure: probabilities sum to 1, no score saw the future, and no datastore held the text."""
