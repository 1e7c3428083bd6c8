"""One layer of the heterogeneous graph transformer, for tokens and for the neighbours that they read.

Parameter names are those of GNN-LM's published checkpoints. Node types: 0 is a token of the text, 1 a train position.
Relations: 0 is within the text or within a window, 1 from a neighbour to a token.

Shapes: B blocks, T tokens, S tokens of text read so far, K neighbours, N nodes, M sources, H heads, C width of a head,
D width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.memory.gnn.attention import banded_attention, neighbor_attention
from fairseq.memory.gnn.config import GnnConfig
from fairseq.memory.gnn.graph import Level
from fairseq.modules.multihead_attention import IncrementalState

TOKEN, NEIGHBOR = 0, 1
INTRA, INTER = 0, 1


class GraphAttentionLayer(nn.Module):
    """Attention of tokens to their text and to their neighbours, and of neighbours to the positions beside them.

    Source: arXiv 2110.08743, sec. 2.3, after the heterogeneous graph transformer of arXiv 2003.01332.
    """

    skip: Tensor

    def __init__(self, config: GnnConfig, dim: int, *, is_last: bool) -> None:
        """Args.

        dim: width of the states.
        is_last: no layer reads the neighbours' states after it, so that it computes none; their weights stay in the
            checkpoint, as the original has them, and are not trained.
        Raises: ValueError when the heads do not divide the width.
        """
        super().__init__()
        self.config, self.dim, self.num_heads = config, config.width(dim), config.graph_attention_heads
        head = self.dim // self.num_heads
        self.q_linears, self.k_linears = _linear_pair(self.dim), _linear_pair(self.dim)
        self.v_linears, self.a_linears = _linear_pair(self.dim), _linear_pair(self.dim)
        self.norms = nn.ModuleList(nn.LayerNorm(self.dim) for _ in (TOKEN, NEIGHBOR))
        self.relation_pri = nn.Parameter(torch.ones(2, self.num_heads))
        self.relation_att = nn.Parameter(torch.empty(2, self.num_heads, head, head))
        self.relation_msg = nn.Parameter(torch.empty(2, self.num_heads, head, head))
        self.register_buffer("skip", torch.ones(2))  # the original has it and never reads it
        if config.graph_mean == "learned":
            self.mixing = nn.Parameter(torch.zeros(self.num_heads))
        self._kept: dict[tuple[int, int], tuple[list[Any], tuple[Projection, Projection]]] = {}
        self.reset_parameters()
        if is_last:
            for module in (self.q_linears[NEIGHBOR], self.a_linears[NEIGHBOR], self.norms[NEIGHBOR]):
                module.requires_grad_(False)
            _linear(self.k_linears, NEIGHBOR).bias.requires_grad_(False)  # a constant, which the softmax takes away
        if config.no_intra_edges:
            for module in (self.k_linears[TOKEN], self.v_linears[TOKEN]):
                module.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw the relations' matrices; everything else is drawn as torch does.

        The original draws them by the shape (2, H, C, C), a bound of sqrt(6 / ((H + 2) C^2)) instead of sqrt(3 / C):
        attention is then nearly uniform at first, and messages nearly zero.
        """
        head = self.relation_att.shape[-1]
        reference = math.sqrt(6 / ((self.num_heads + 2) * head * head))
        bound = reference if self.config.graph_start == "reference" else math.sqrt(3 / head)
        nn.init.uniform_(self.relation_att, -bound, bound)
        nn.init.uniform_(self.relation_msg, -bound, bound)

    def update_neighbors(self, state_MD: Tensor, level: Level) -> Tensor:
        """States of the neighbours' nodes after this layer, (N, D)."""
        if not torch.is_grad_enabled() or self.config.graph_recompute:
            return by_chunks(self._update, state_MD, level, self._neighbor_parameters())
        return self._update(state_MD, level.source_N3, level.has_N3)

    def neighbor_weights(self) -> list[Tensor]:
        """The weights that :meth:`update_neighbors` reads."""
        own = self._neighbor_parameters()
        return [*own[:-3], *(relations[INTRA] for relations in own[-3:])]

    def _neighbor_parameters(self) -> list[nn.Parameter]:
        parts = (self.q_linears, self.k_linears, self.v_linears, self.a_linears, self.norms)
        own = [parameter for part in parts for parameter in part[NEIGHBOR].parameters()]
        return [*own, self.relation_pri, self.relation_att, self.relation_msg]

    def _update(self, state_MD: Tensor, source_N3: Tensor, has_N3: Tensor) -> Tensor:
        key_weights, value_weights = self._relation(NEIGHBOR, INTRA)
        state_MD = state_MD.to(key_weights.weight.dtype)
        own_ND = state_MD.index_select(0, source_N3[:, 1])
        out_NHC = banded_attention(
            self._heads(_linear(self.q_linears, NEIGHBOR)(own_ND)),
            self._heads(F.linear(state_MD, key_weights.weight, key_weights.bias)),
            self._heads(F.linear(state_MD, value_weights.weight, value_weights.bias)),
            source_N3,
            has_N3,
            self.config.graph_attention_dropout if self.training else 0.0,
        )
        return self._added(own_ND, _linear(self.a_linears, NEIGHBOR)(out_NHC.flatten(1)), NEIGHBOR)

    def _relation(self, source: int, relation: int) -> tuple[Projection, Projection]:
        """Keys and values of a type of nodes as a relation has them: (h K) A = h (K A), with the scores' scale in A.

        A product of weights instead of one with every state. In evaluation it is kept: for a token at a time it would
        take as long as a thousand tokens' products with the matrices.
        """
        parts = (_linear(self.k_linears, source), _linear(self.v_linears, source))
        weights = [*(w for part in parts for w in (part.weight, part.bias))]
        weights += [self.relation_pri, self.relation_att, self.relation_msg]
        keeps = not (self.training or torch.is_grad_enabled() or any(w.is_inference() for w in weights))
        marks = [(w.data_ptr(), w._version, w.dtype) for w in weights] if keeps else []
        kept = self._kept.get((source, relation))
        if keeps and kept is not None and kept[0] == marks:
            return kept[1]
        scale_H = self.relation_pri[relation] / math.sqrt(self.dim // self.num_heads)
        matrices = (self.relation_att[relation] * scale_H[:, None, None], self.relation_msg[relation])
        key, value = (_projection(part, matrix) for part, matrix in zip(parts, matrices))
        if keeps:
            self._kept[source, relation] = (marks, (key, value))
        return key, value

    def train(self, mode: bool = True) -> GraphAttentionLayer:
        """As for every module; products of weights that evaluation kept are dropped."""
        self._kept.clear()
        super().train(mode)
        return self

    def forward(
        self,
        hidden_BTD: Tensor,
        state_MD: Tensor,
        index_BTK: Tensor,
        keep_BTK: Tensor,
        incremental_state: IncrementalState | None = None,
        name: str = "",
    ) -> Tensor:
        """Tokens' states after this layer, (B, T, D).

        Args:
            hidden_BTD: their states before it; texts are padded on the right only.
            state_MD: states of the neighbours' nodes before it.
            index_BTK: int64 row of each neighbour's state.
            keep_BTK: False for neighbours that do not count.
            incremental_state: keys and values of the tokens before, under ``name``.
        """
        query_BTHC = self._heads(_linear(self.q_linears, TOKEN)(hidden_BTD))
        inter_BTHC = self._inter(query_BTHC, state_MD, index_BTK, keep_BTK)
        if self.config.no_intra_edges:
            message_BTHC = inter_BTHC
        else:
            intra_BTHC = self._intra(query_BTHC, hidden_BTD, incremental_state, name)
            message_BTHC = self._mean(intra_BTHC, inter_BTHC, keep_BTK)
        update_BTD = _linear(self.a_linears, TOKEN)(message_BTHC.flatten(2))
        return self._added(hidden_BTD, update_BTD, TOKEN)

    def _intra(
        self, query_BTHC: Tensor, hidden_BTD: Tensor, incremental_state: IncrementalState | None, name: str
    ) -> Tensor:
        keys, values = self._relation(TOKEN, INTRA)
        key_BHSC = self._heads(F.linear(hidden_BTD, keys.weight, keys.bias)).transpose(1, 2)
        value_BHSC = self._heads(F.linear(hidden_BTD, values.weight, values.bias)).transpose(1, 2)
        if incremental_state is not None:
            key_BHSC, value_BHSC = incremental_state.extend(name, key_BHSC, value_BHSC)
        length, read, last = query_BTHC.shape[1], key_BHSC.shape[2], self.config.intra_context
        is_causal = length == read and not last
        out_BHTC = F.scaled_dot_product_attention(
            query_BTHC.transpose(1, 2),
            key_BHSC,
            value_BHSC,
            attn_mask=None if is_causal else visible_text(length, read, last, hidden_BTD.device),
            dropout_p=self.config.graph_attention_dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=1.0,
        )
        return out_BHTC.transpose(1, 2)

    def _inter(self, query_BTHC: Tensor, state_MD: Tensor, index_BTK: Tensor, keep_BTK: Tensor) -> Tensor:
        keys, values = self._relation(NEIGHBOR, INTER)
        query_HNC = query_BTHC.flatten(0, 1).transpose(0, 1)
        mean_NHD, sum_NH = neighbor_attention(
            (query_HNC @ keys.weight.view(self.num_heads, -1, self.dim)).transpose(0, 1).contiguous(),
            state_MD,
            index_BTK.flatten(0, 1),
            keep_BTK.flatten(0, 1),
            self.config.graph_attention_dropout if self.training else 0.0,
        )
        value_HDC = values.weight.view(self.num_heads, -1, self.dim).transpose(1, 2)
        bias_HNC = sum_NH.t()[:, :, None] * values.bias.view(self.num_heads, 1, -1)
        message_HNC = torch.baddbmm(bias_HNC, mean_NHD.transpose(0, 1), value_HDC)
        return message_HNC.transpose(0, 1).reshape(query_BTHC.shape)

    def _mean(self, intra_BTHC: Tensor, inter_BTHC: Tensor, keep_BTK: Tensor) -> Tensor:
        if self.config.graph_mean == "learned":
            share_H1 = self.mixing.sigmoid()[:, None]
            return (1 - share_H1) * intra_BTHC + share_H1 * inter_BTHC
        half_BTHC = (intra_BTHC + inter_BTHC) / 2
        if self.config.graph_mean == "present":
            return torch.where(keep_BTK.any(2)[:, :, None, None], half_BTHC, intra_BTHC)
        return half_BTHC

    def _added(self, before: Tensor, update: Tensor, kind: int) -> Tensor:
        out: Tensor = self.norms[kind](before + F.dropout(update, self.config.graph_dropout, self.training))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.dim // self.num_heads)


@dataclass(frozen=True)
class Projection:
    """Weight (D, D) and bias (D,) of a linear map."""

    weight: Tensor
    bias: Tensor


def _projection(linear: nn.Linear, matrix_HCC: Tensor) -> Projection:
    """A linear map whose output is multiplied by a matrix per head."""
    heads = len(matrix_HCC)
    weight_HCD, bias_HC1 = linear.weight.view(heads, -1, linear.in_features), linear.bias.view(heads, -1, 1)
    turned_HCC = matrix_HCC.transpose(1, 2)
    return Projection((turned_HCC @ weight_HCD).flatten(0, 1), (turned_HCC @ bias_HC1).flatten())


def _linear_pair(dim: int) -> nn.ModuleList:
    """A square linear map for each type of nodes."""
    return nn.ModuleList(nn.Linear(dim, dim) for _ in (TOKEN, NEIGHBOR))


def _linear(linears: nn.ModuleList, kind: int) -> nn.Linear:
    linear = linears[kind]
    assert isinstance(linear, nn.Linear)
    return linear


def visible_text(length: int, read: int, last: int, device: torch.device) -> Tensor | None:
    """bool (length, read): what each of the last tokens of a text sees of it; None when that is everything.

    Args:
        last: tokens that each sees, itself included; 0 is all before it.
    """
    if length == 1 and (not last or read <= last):
        return None
    visible = torch.ones(length, read, dtype=torch.bool, device=device).tril(read - length)
    return visible.triu(read - length - last + 1) if last else visible


Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_chunks(update: Update, state_MD: Tensor, level: Level, parameters: list[nn.Parameter]) -> Tensor:
    """``update`` over one slice of a level at a time; its gradient computes each slice once more.

    Args:
        update: states of the nodes of a slice, from (states, their source rows, which of them exist).
        parameters: those that ``update`` reads.
    """
    out_ND: Tensor = _ByChunks.apply(update, level, state_MD, *parameters)  # type: ignore[no-untyped-call]
    return out_ND


class _ByChunks(torch.autograd.Function):
    """Slices of the states would each get a gradient as large as all of them from autograd; here one is filled."""

    @staticmethod
    def forward(ctx: Any, update: Update, level: Level, state_MD: Tensor, *parameters: Tensor) -> Tensor:  # noqa: D102
        ctx.update, ctx.level, ctx.parameters, ctx.random = update, level, parameters, []
        ctx.save_for_backward(state_MD)
        parts = []
        for chunk in level.chunks:
            ctx.random.append(_random_state(state_MD.device))
            parts.append(update(*_slice(state_MD, level, chunk)))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        (state_MD,) = ctx.saved_tensors
        state_grad = torch.zeros_like(state_MD) if ctx.needs_input_grad[2] else None
        trained = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[3:]) if needed]
        sums = [torch.zeros_like(p) for p in trained]
        now = _random_state(state_MD.device)
        for chunk, random in zip(ctx.level.chunks, ctx.random):
            start, stop, low, high = chunk
            _set_random_state(state_MD.device, random)
            with torch.enable_grad():
                state, source, has = _slice(state_MD, ctx.level, chunk)
                state = state.detach().requires_grad_(state_grad is not None)
                out = ctx.update(state, source, has)
            inputs = [*([state] if state_grad is not None else []), *trained]
            found = list(torch.autograd.grad(out, inputs, grads[0][start:stop], allow_unused=True))
            if state_grad is not None:
                state_grad[low:high] += found.pop(0)
            for total, part in zip(sums, found):
                if part is not None:
                    total += part
        _set_random_state(state_MD.device, now)
        by_parameter = iter(sums)
        needed = ctx.needs_input_grad[3:]
        return (None, None, state_grad, *(next(by_parameter) if is_needed else None for is_needed in needed))


def _slice(state_MD: Tensor, level: Level, chunk: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    start, stop, low, high = chunk
    return state_MD[low:high], level.source_N3[start:stop] - low, level.has_N3[start:stop]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
