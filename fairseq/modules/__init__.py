"""Building blocks of models, with fairseq's parameter names."""
