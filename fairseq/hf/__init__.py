"""Models of the transformers library with this project's memories; see docs/huggingface.md."""
