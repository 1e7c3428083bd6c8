"""The memories for Hugging Face models; only here and in examples/ is transformers imported."""
