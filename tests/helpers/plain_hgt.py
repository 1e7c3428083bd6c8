"""The heterogeneous graph transformer and its graphs as the paper draws them: nodes, edges, and loops over both.

Nothing is shared, trimmed or merged; every node of every layer is computed. Independent of ``fairseq.memory.gnn``.
"""

import math

import torch
from torch import nn


class Graph:
    """Train positions of the nodes, and the edges (source, target) of the three kinds."""

    def __init__(self):
        self.position = []
        self.inter = []  # neighbour node -> token
        self.within = []  # neighbour node -> neighbour node
        self.text = []  # token -> token


def kept(neighbors, corpus_length, band=0, first=None, documents=None):
    """[(token, neighbour)] that are not dropped; ``first`` is the train position of token 0, None outside of train."""
    found = []
    for token, row in enumerate(neighbors):
        for j in row:
            assert j < corpus_length
            near = first is not None and abs(first + token - j) < band
            own = documents is not None and first is not None and documents[first + token] == documents[j]
            if j >= 0 and not near and not own:
                found.append((token, j))
    return found


def window_of(j, left, right, corpus_length, documents=None):
    window = range(max(0, j - left), min(corpus_length - 1, j + right) + 1)
    return [p for p in window if documents is None or documents[p] == documents[j]]


def occurrence_graph(pairs, num_tokens, left, right, corpus_length, documents=None, band=None, first=None):
    """A window for each occurrence of a neighbour; with ``band`` it is cut where it would reach into the band."""
    graph = Graph()
    for token, j in pairs:
        window = window_of(j, left, right, corpus_length, documents)
        if band is not None:
            window = [p for p in window if abs(p - (first + token)) >= band]
        at = len(graph.position)
        graph.position += window
        for a in range(len(window)):
            graph.within += [(at + b, at + a) for b in range(len(window)) if abs(a - b) <= 1]
        graph.inter.append((at + window.index(j), token))
    graph.text = [(u, v) for v in range(num_tokens) for u in range(v + 1)]
    return graph


def merged_graph(pairs, num_tokens, left, right, corpus_length):
    """One node per train position of the block, joined with what stands beside it."""
    graph = Graph()
    graph.position = sorted({p for _, j in pairs for p in window_of(j, left, right, corpus_length)})
    node = {p: number for number, p in enumerate(graph.position)}
    graph.within = [(node[p + step], node[p]) for p in graph.position for step in (-1, 0, 1) if p + step in node]
    graph.inter = [(node[j], token) for token, j in pairs]
    graph.text = [(u, v) for v in range(num_tokens) for u in range(v + 1)]
    return graph


def attend(query_NHC, key_MHC, value_MHC, edges, count, drop=None):
    """Softmax over the edges into each node, one node after the other."""
    out = torch.zeros(count, *value_MHC.shape[1:], dtype=value_MHC.dtype)
    rows = []
    for target in range(count):
        sources = [s for s, t in edges if t == target]
        if not sources:
            rows.append(out[target])
            continue
        score = torch.stack([(query_NHC[target] * key_MHC[s]).sum(-1) for s in sources])
        rows.append((score.softmax(0)[:, :, None] * value_MHC[sources]).sum(0))
    return torch.stack(rows)


def plain_layer(weights, prefix, heads, token, node, graph, *, divide=None, intra=True):
    """One layer over all tokens and nodes, with the published names of the weights."""

    def linear(name, kind, x):
        return (
            x @ weights[f"{prefix}.{name}_linears.{kind}.weight"].t() + weights[f"{prefix}.{name}_linears.{kind}.bias"]
        )

    def split(x):
        return x.view(len(x), heads, -1)

    def norm(kind, x):
        return nn.functional.layer_norm(
            x, x.shape[-1:], weights[f"{prefix}.norms.{kind}.weight"], weights[f"{prefix}.norms.{kind}.bias"]
        )

    def triple(source, source_kind, target, target_kind, relation, edges):
        query = split(linear("q", target_kind, target))
        key = torch.einsum(
            "nhi,hij->nhj", split(linear("k", source_kind, source)), weights[f"{prefix}.relation_att"][relation]
        )
        value = torch.einsum(
            "nhi,hij->nhj", split(linear("v", source_kind, source)), weights[f"{prefix}.relation_msg"][relation]
        )
        scale = weights[f"{prefix}.relation_pri"][relation][:, None] / math.sqrt(query.shape[-1])
        return attend(query * scale, key, value, edges, len(target)).flatten(1)

    inter = triple(node, 1, token, 0, 1, graph.inter) if len(node) else torch.zeros_like(token)
    message = (triple(token, 0, token, 0, 0, graph.text) + inter) / 2 if intra else inter
    new_token = norm(0, token + linear("a", 0, message))
    within = triple(node, 1, node, 1, 0, graph.within) if len(node) else node
    new_node = norm(1, node + linear("a", 1, within)) if len(node) else node
    return new_token, new_node


def plain_hgt(weights, num_layers, heads, token, node, graph, **options):
    """States of tokens and nodes after all layers."""
    for number in range(num_layers):
        token, node = plain_layer(weights, f"gcs.{number}", heads, token, node, graph, **options)
    return token, node
