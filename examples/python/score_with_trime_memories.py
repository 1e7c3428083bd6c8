"""Score a text with TRIME's local and long-term memories, passage by passage.

Both offer earlier positions of the text itself; vocabulary and memories share one normalisation (arXiv 2205.12674).
The logits are random, and a key is a vector of the last token: the text repeats, and the memories notice.
"""

import torch

from fairseq.memory import JointNormalization, LocalMemory, Passage, RollingMemory
from fairseq.memory.scoring import log_sums

torch.manual_seed(0)
text = torch.randperm(50)[:40].repeat(5)
key_of_token = torch.randn(50, 64)  # stands for the model's hidden state after a token
local, rolling = LocalMemory(), RollingMemory(size=128)
combine = JointNormalization(dim=64)

lm_logps, logps = [], []
for number in range(12):
    tokens = text[16 * number : 16 * number + 17]  # each passage continues the one before
    passage = Passage(number, key_of_token[tokens[:-1]], tokens[1:], num_context=0)
    logits = torch.randn(16, 50)  # your model's output
    norm = logits.logsumexp(1)
    lm_logp = logits.gather(1, passage.targets[:, None])[:, 0] - norm

    sums = log_sums(local.lookup(passage), passage.targets, temperature=1.0)
    sums = log_sums(rolling.lookup(passage), passage.targets, temperature=1.0).plus(sums)
    rolling.append(passage)  # after scoring: no position sees itself
    logps.append(combine(lm_logp, norm, None, passage.targets, sums))
    lm_logps.append(lm_logp)

print(f"perplexity without memory {(-torch.cat(lm_logps).mean()).exp():.1f}", end=", ")
print(f"with memory {(-torch.cat(logps).mean()).exp():.1f}")
