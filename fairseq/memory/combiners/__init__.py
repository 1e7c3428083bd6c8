"""How candidates and the language model's scores become one log-probability."""
