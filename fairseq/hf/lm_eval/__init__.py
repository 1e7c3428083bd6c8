"""The model ``fairseq-memory`` of lm-evaluation-harness: a transformers model with one of this project's memories."""
