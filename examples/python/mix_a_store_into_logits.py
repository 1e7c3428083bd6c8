"""Mix a datastore into the logits of any model (kNN-LM): three lines open a store, search it and combine.

The "model" is random logits, and the store holds 10,000 random keys, so the program needs no download. Replace the
keys by hidden states of your model and the logits by its output.
"""

import tempfile

import torch

from fairseq.memory import DatastoreWriter, ExternalMemory, Interpolation

torch.manual_seed(0)
keys, tokens = torch.randn(10_000, 64), torch.randint(0, 100, (10_000,))  # one key per token of a training text
logits = torch.randn(5, 100)  # your model's output at 5 positions of a text,
queries, targets = keys[:5] + 0.1 * torch.randn(5, 64), tokens[:5]  # its hidden states, and the tokens that come next
norm = logits.logsumexp(1)
logp = logits.gather(1, targets[:, None])[:, 0] - norm

with tempfile.TemporaryDirectory() as folder:
    with DatastoreWriter(f"{folder}/store", *keys.shape) as writer:
        writer.append(keys, tokens)
        writer.finish()

    memory = ExternalMemory.open(f"{folder}/store", k=16)
    candidates = memory.lookup(queries)
    mixed = Interpolation(weight=0.25)(logp, norm, candidates, targets)

print(f"perplexity without memory {(-logp.mean()).exp():.2f}, with memory {(-mixed.mean()).exp():.2f}")
