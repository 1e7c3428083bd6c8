"""Beam search of one sentence in plain Python: whole texts are read anew for each token, in float64."""

import math

import torch

BOS, PAD, EOS, UNK = 0, 1, 2, 3


def next_logp(model, source, tokens, mix=None):
    """Log-probability of every type after ``tokens``, a list of floats."""
    text = torch.tensor([[EOS, *tokens]])
    given = {} if source is None else {"source_BS": torch.tensor([source])}
    out = model(text, "model_output", **given)
    logits = model.vocab_scores(out.hidden_BTD[:, -1]).double()
    logp = logits.log_softmax(1)
    if mix is not None:
        logp = mix(logits, logp, out.key_BTD[:, -1])
    return logp[0].tolist()


def beam_search(model, source, *, beam, limit, lenpen=1.0, unkpen=0.0, min_len=1, prefix=(), ngram=0, mix=None):
    """The hypotheses (tokens, score, logps), the best first; at most ``beam`` of them."""
    live, done = [([], [])], []
    for step in range(limit + 1):
        candidates = []
        for tokens, logps in live:
            scores = next_logp(model, source, tokens, mix)
            scores[PAD] = -math.inf
            scores[UNK] -= unkpen
            if step < min(min_len, limit):
                scores[EOS] = -math.inf
            if ngram:
                for word in range(len(scores)):
                    text = [*tokens, word]
                    grams = [tuple(text[i : i + ngram]) for i in range(len(text) - ngram + 1)]
                    if grams and grams[-1] in grams[:-1]:
                        scores[word] = -math.inf
            if step >= limit:
                scores = [score if word == EOS else -math.inf for word, score in enumerate(scores)]
            if step < len(prefix):
                candidates += [([*tokens, prefix[step]], [*logps, scores[prefix[step]]])]
                continue
            candidates += [([*tokens, word], [*logps, score]) for word, score in enumerate(scores)]
        candidates = [c for c in candidates if c[1][-1] > -math.inf]
        best = sorted(candidates, key=lambda c: -sum(c[1]))[: 2 * beam]
        done += [c for c in best[:beam] if c[0][-1] == EOS][: beam - len(done)]
        live = [c for c in best if c[0][-1] != EOS][:beam]
        if len(done) >= beam or not live:
            break
    scored = [(tokens, sum(logps) / len(tokens) ** lenpen, logps) for tokens, logps in done]
    return sorted(scored, key=lambda c: -c[1])
