"""Keys that could still be among a query's best, while a search goes on."""
