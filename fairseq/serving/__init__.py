"""A model with its memories behind OpenAI's HTTP interface: requests, the engine that answers them, and the stores."""
