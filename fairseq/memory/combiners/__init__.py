"""Ways to combine candidates with the language model's scores into one log-probability."""
