"""How weights, gradients and optimizer states lie on the processes of a training run (``--strategy``)."""
