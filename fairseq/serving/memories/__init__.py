"""What a server reads and writes: datastores, memories inside attention, and rows as clients see them."""
