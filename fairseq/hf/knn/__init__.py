"""kNN-LM and RetoMaton around a Hugging Face model: save a datastore, mix it in, evaluate."""
