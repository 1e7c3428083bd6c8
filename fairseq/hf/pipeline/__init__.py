"""From pairs of texts to an evaluated model with memory: tokenise, train, save a datastore, evaluate."""
