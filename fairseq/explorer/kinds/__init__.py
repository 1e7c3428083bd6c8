"""What can be explored: each module opens one kind of model, memory and text."""
