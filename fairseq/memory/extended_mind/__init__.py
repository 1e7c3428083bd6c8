"""External memories inside attention: each query attends to its k closest memories and to its local keys at once.

Source: Extended Mind Transformers, arXiv 2406.02332. Takes tensors only; ``fairseq/memory/hf`` puts it into models.
"""
