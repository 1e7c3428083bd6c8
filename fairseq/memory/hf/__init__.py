"""Memory for Hugging Face models; the only part of the library that imports transformers."""
