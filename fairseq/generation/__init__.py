"""Text generated token by token: beam search and sampling, with or without a memory."""
