"""Builds an index over a datastore: train, encode, assemble; every step survives a kill."""
