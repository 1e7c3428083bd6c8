"""Extended Mind around a Hugging Face decoder: memories inside attention, with citations."""
