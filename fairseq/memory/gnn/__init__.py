"""GNN-LM (arXiv 2110.08743): attention over a graph of the neighbours' contexts, in plain tensors."""
