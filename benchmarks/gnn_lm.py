"""Training GNN-LM's layers in the lean form over a window of its own for each neighbour, and evaluation over training.

One block of 256 tokens with 32 neighbours, windows of two positions each way, three layers of width 256 and four heads,
one thread. The language model and the softmax are left out, except where evaluation from stored states is compared with
the language model alone (six layers of that width, 10,000 types), which then belongs to both. The plain form computes
every node of every window in every layer, from dense tensors (tokens x neighbours x window), which is faster than edge
lists. Neighbours are drawn so that a share of them is of distinct positions: 0.4, as among neighbours of natural text,
and 1, the lean form's worst case.

Where torch_geometric is installed, its HGTConv takes turns with the lean form: as many layers, heads and columns over
the same nodes and edges, all windows side by side. Its formulas are not GNN-LM's: one softmax over all that a node
reads, where GNN-LM has the mean of one for each relation; matrices of its own for each of the three kinds of edges,
where GNN-LM's two kinds within a text and within a window share them; gelu before the output, a gate with the state
before it, and no layer norm. So only speed and memory are compared.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

CORPUS, HEADS, LAYERS, SIDE = 100_000, 4, 3, 2
SHARES = (0.4, 1.0)
EVALUATIONS = 10  # in a row, so that a turn is not over before a busy machine comes back to it
SPEED, MEMORY, EVALUATION, OF_LM, GROWTH = 4.0, 0.25, 20.0, 0.5, 2.1
LM = {"decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_embed_dim": 1024}
TYPES = 10_000


def draw_neighbors(tokens: int, k: int, share: float) -> Any:
    """Neighbours (1, T, K) of which about a share is distinct."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = tokens * k
    if share == 1.0:  # apart from each other, too: no two windows share a position
        return (torch.randperm(CORPUS // 6, generator=generator)[:count] * 6).view(1, tokens, k)
    # Of draws with replacement from a pool of p per draw, p (1 - exp(-1 / p)) are distinct.
    low, high = 0.01, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - math.exp(-1 / middle)) < share else (low, middle)
    pool = torch.randperm(CORPUS, generator=generator)[: max(1, round(low * count))]
    return pool[torch.randint(len(pool), (1, tokens, k), generator=generator)]


def plain_layer(layer: Any, token_TD: Any, node_TKWD: Any, there_TKW: Any) -> tuple[Any, Any]:
    """One layer over all tokens and all positions of all windows, projected one by one."""
    import torch

    heads, center = layer.num_heads, node_TKWD.shape[2] // 2
    scale = 1 / math.sqrt(layer.dim // heads)

    def split(x: Any) -> Any:
        return x.unflatten(-1, (heads, -1))

    def project(kind: int, source: Any, relation: int) -> tuple[Any, Any]:
        key = torch.einsum("...hi,hij->...hj", split(layer.k_linears[kind](source)), layer.relation_att[relation])
        value = torch.einsum("...hi,hij->...hj", split(layer.v_linears[kind](source)), layer.relation_msg[relation])
        return key * (layer.relation_pri[relation] * scale)[:, None], value

    query_THC = split(layer.q_linears[0](token_TD))
    key, value = project(0, token_TD, 0)
    seen_TT = torch.ones(len(token_TD), len(token_TD), dtype=torch.bool).tril()
    weight = torch.einsum("thc,shc->hts", query_THC, key).masked_fill(~seen_TT, -torch.inf).softmax(2)
    text_THC = torch.einsum("hts,shc->thc", weight, value)
    key, value = project(1, node_TKWD[:, :, center], 1)
    weight = torch.einsum("thc,tkhc->thk", query_THC, key).softmax(2)
    near_THC = torch.einsum("thk,tkhc->thc", weight, value)
    new_token = layer.norms[0](token_TD + layer.a_linears[0](((text_THC + near_THC) / 2).flatten(1)))

    query = split(layer.q_linears[1](node_TKWD))
    key, value = project(1, node_TKWD, 0)
    shifts = [_shifted(x, step) for step in (-1, 0, 1) for x in (key, value)]
    there = torch.stack([_shifted(there_TKW, step) for step in (-1, 0, 1)], 3)
    score = torch.stack([(query * shifted).sum(-1) for shifted in shifts[::2]], 3)
    weight = score.masked_fill(~there[..., None], -torch.inf).softmax(3)
    message = sum(weight[:, :, :, n, :, None] * shifted for n, shifted in enumerate(shifts[1::2]))
    new_node = layer.norms[1](node_TKWD + layer.a_linears[1](message.flatten(3)))
    return new_token, new_node


def _shifted(x: Any, step: int) -> Any:
    """The windows' positions one to the left or to the right; beyond the ends there is nothing."""
    import torch

    if not step:
        return x
    nothing = torch.zeros_like(x[:, :, :1])
    return torch.cat([nothing, x[:, :, :-1]], 2) if step < 0 else torch.cat([x[:, :, 1:], nothing], 2)


HAS_GEOMETRIC = importlib.util.find_spec("torch_geometric") is not None


class Geometric:
    """torch_geometric's HGTConv over tokens and all positions of all windows."""

    relations = (("token", "before", "token"), ("node", "near", "token"), ("node", "beside", "node"))

    def __init__(self, dim: int) -> None:
        import torch
        from torch_geometric.nn import HGTConv

        kinds = (["token", "node"], list(self.relations))
        self.layers = torch.nn.ModuleList(HGTConv(dim, dim, kinds, HEADS) for _ in range(LAYERS))
        self.optimizer = torch.optim.Adam(self.layers.parameters(), lr=1e-5)

    def __call__(self, token_TD: Any, node_TKWD: Any, there_TKW: Any) -> Any:
        """States of the tokens after the layers, (T, D)."""
        states = {"token": token_TD, "node": node_TKWD.flatten(0, 2)}
        edges = dict(zip(self.relations, self.edges(there_TKW)))
        for layer in self.layers:
            states = layer(states, edges)
        return states["token"]

    @staticmethod
    def edges(there_TKW: Any) -> tuple[Any, Any, Any]:
        """(2, edges) of sources and readers for each relation: earlier tokens, centres, and positions side by side."""
        import torch

        tokens, k, width = there_TKW.shape
        node_TKW = torch.arange(there_TKW.numel()).view(there_TKW.shape)
        text = torch.ones(tokens, tokens, dtype=torch.bool).tril().nonzero().t().flip(0)
        centers = torch.stack([node_TKW[:, :, width // 2].flatten(), torch.arange(tokens).repeat_interleave(k)])
        pairs = []
        for step in (-1, 0, 1):
            source, reader = slice(max(0, step), width + min(0, step)), slice(max(0, -step), width + min(0, -step))
            both = there_TKW[:, :, source] & there_TKW[:, :, reader]
            pairs.append(torch.stack([node_TKW[:, :, source][both], node_TKW[:, :, reader][both]]))
        return text, centers, torch.cat(pairs, 1)


class Bench:
    """A network, features and a block, and the steps that are measured."""

    def __init__(self, options: Any, share: float, tokens: int, k: int) -> None:
        import torch

        from fairseq.memory.datastore.chunked_array import ChunkedArray
        from fairseq.memory.gnn.config import GnnConfig, GraphConfig
        from fairseq.memory.gnn.features import KeyFeatures
        from fairseq.memory.gnn.graph import GraphBuilder
        from fairseq.memory.gnn.network import GraphNetwork

        torch.set_num_threads(1)
        torch.manual_seed(0)
        given = {
            "graph_dropout": 0.0,
            "graph_attention_dropout": 0.0,
            "graph_start": "reference",
            "graph_recompute": options.recompute,
        }
        self.network = GraphNetwork(GnnConfig(graph_layer=LAYERS, graph_attention_heads=HEADS, **given), options.dim)
        for layer in self.network.gcs:  # attention that is far from uniform
            torch.nn.init.normal_(layer.relation_att, std=0.3)
            torch.nn.init.normal_(layer.relation_msg, std=0.3)
        # Drawn in pieces: the process at rest should be small beside the steps.
        keys = torch.cat([torch.randn(1000, options.dim).half() for _ in range(CORPUS // 1000)]).numpy()
        self.features = KeyFeatures(ChunkedArray([keys]), "made up")
        self.build = GraphBuilder(GraphConfig(neighbor_context=(SIDE, SIDE)), LAYERS, CORPUS)
        self.neighbors, self.hidden = draw_neighbors(tokens, k, share), torch.randn(1, tokens, options.dim)
        self.distinct = len(self.neighbors.unique()) / self.neighbors.numel()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-5)
        self.dim = options.dim

    @cached_property
    def geometric(self) -> Geometric:
        """Made when it is used first: its imports would count in the memory of the other forms."""
        return Geometric(self.dim)

    def _update(self, out: Any, optimizer: Any = None) -> None:
        optimizer = optimizer or self.optimizer
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()

    def lean(self) -> Any:
        """The network's output, graph and features included."""
        graph = self.build(self.neighbors)
        return self.network(self.hidden, self.network.encode(graph, self.features.take(graph.position_P)))

    def plain(self) -> Any:
        """The same by a window for each neighbour, indices and features included."""
        node, there_TKW = self.windows()
        token = self.hidden[0]
        for layer in self.network.gcs:
            token, node = plain_layer(layer, token, node, there_TKW)
        return token[None]

    def windows(self) -> tuple[Any, Any]:
        """Features (T, K, W, D) of every position of every window, and which of them are in the text."""
        import torch

        position_TKW = self.neighbors[0, :, :, None] + torch.arange(-SIDE, SIDE + 1)
        there_TKW = (position_TKW >= 0) & (position_TKW < CORPUS)
        node = self.features.take(position_TKW.clamp(0, CORPUS - 1).flatten()).view(*position_TKW.shape, -1)
        return node, there_TKW

    def train_lean(self) -> None:
        """A step of training."""
        self._update(self.lean())

    def train_plain(self) -> None:
        """The same, plain."""
        self._update(self.plain())

    def train_geometric(self) -> None:
        """A step of torch_geometric's layers; edges and features are made in it too."""
        self._update(self.geometric(self.hidden[0], *self.windows()), self.geometric.optimizer)

    def evaluation(self, folder: Path) -> Callable[[], Any]:
        """Evaluation of the block from stored states (float16, on disk)."""
        import torch

        from fairseq.memory.gnn.cached import StateSource, store_states

        cached = store_states(StateSource(self.network.eval(), self.features, self.build), folder / "states.npy")
        self.cached = cached

        def step() -> Any:
            with torch.no_grad():
                for _ in range(EVALUATIONS):
                    out = self.network(self.hidden, cached.lookup(self.neighbors))
            return out

        return step

    def whole_models(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Evaluation of the block by the language model alone, and by it and the layers from stored states."""
        import torch

        from fairseq.memory.gnn.inputs import FoundNeighbors
        from fairseq.models.architectures import build_model_config
        from fairseq.models.graph_lm import GraphLanguageModel
        from fairseq.models.transformer_lm import TransformerLanguageModel

        given = LM | {"decoder_embed_dim": self.dim}
        alone = TransformerLanguageModel.build(build_model_config("transformer_lm", given), TYPES, 1).eval()
        graph = {"graph_attention_heads": HEADS, "graph_layer": LAYERS}
        both = GraphLanguageModel.build(build_model_config("transformer_lm_gnn", given | graph), TYPES, 1)
        both.gnn = self.network
        both.eval()
        text_BT = torch.randint(4, TYPES, self.neighbors.shape[:2])

        def score(model: Any, **source: Any) -> Any:
            return model.target_logp(model(text_BT, **source).hidden_BTD.flatten(0, 1), text_BT.flatten())[0]

        def run_alone() -> Any:
            with torch.inference_mode():
                return score(alone)

        def run_both() -> Any:
            with torch.inference_mode():
                return score(both, neighbors=FoundNeighbors(cached=self.cached.lookup(self.neighbors)))

        return run_alone, run_both

    def require_equal(self, evaluate: Callable[[], Any]) -> float:
        """Largest difference of the two forms; raises where they, or stored states, differ by more than rounding."""
        import torch

        with torch.no_grad():
            lean, plain, stored = self.lean(), self.plain(), evaluate()
        difference = float((lean - plain).abs().max())
        if difference > 1e-4 or float((lean - stored).abs().max()) > 0.05:
            raise RuntimeError(f"the forms differ by {difference}")
        return difference


def resident_bytes() -> dict[str, int]:
    """Memory of this process: now, and at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    return {"now": held["VmRSS"], "peak": held["VmHWM"]}


def measure_memory(options: Any) -> None:
    """Print the memory of two steps of one form, as JSON; in a process of its own."""
    bench = Bench(options, options.share, options.tokens, options.k)
    neighbors, hidden = bench.neighbors, bench.hidden
    bench.neighbors, bench.hidden = neighbors[:, :2], hidden[:, :2]
    getattr(bench, f"train_{options.memory_of}")()  # loads what is loaded when it is used first, such as kernels
    bench.neighbors, bench.hidden = neighbors, hidden
    before = resident_bytes()["now"]
    for _ in range(2):
        getattr(bench, f"train_{options.memory_of}")()
    peak = resident_bytes()["peak"]
    sys.stdout.write(json.dumps({"peak": peak, "step": peak - before}))


def memory_of(form: str, options: Any, share: float, tokens: int, k: int) -> dict[str, int]:
    """Peak memory in bytes of a process, and the part of it that its steps took."""
    words = ["--memory-of", form, "--share", share, "--tokens", tokens, "--k", k, "--dim", options.dim]
    words += ["--recompute"] if options.recompute else []
    command = [sys.executable, os.path.abspath(__file__), *map(str, words)]
    # Freed blocks go back to the system at once, so that the peak is of what is held and not of what was.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def compare(options: Any, share: float, folder: Path) -> dict[str, Any]:
    """All figures for one share of distinct neighbours."""
    bench = Bench(options, share, options.tokens, options.k)
    folder.mkdir()
    evaluate = bench.evaluation(folder)
    difference = bench.require_equal(evaluate)
    bench.network.train()
    lean, plain = common.in_turn(bench.train_lean, bench.train_plain, options.repeats)
    bench.network.eval()
    evaluation, again = common.in_turn(evaluate, bench.train_lean, options.repeats)
    alone, both = common.in_turn(*bench.whole_models(), options.repeats)
    per_evaluation = [seconds / EVALUATIONS for seconds in evaluation]
    memory = {form: memory_of(form, options, share, options.tokens, options.k) for form in ("lean", "plain")}
    figures = {
        "distinct": bench.distinct,
        "difference": difference,
        "speed": common.median_ratio(plain, lean),
        "evaluation_over_training": EVALUATIONS * common.median_ratio(again, evaluation),
        "evaluation_over_language_model": common.median_ratio(alone, both),
        "tokens_per_second": {
            name: options.tokens / statistics.median(seconds)
            for name, seconds in (
                ("lean", lean),
                ("plain", plain),
                ("evaluation", per_evaluation),
                ("language model", alone),
                ("both", both),
            )
        },
        "bytes": memory,
        "memory": memory["lean"]["peak"] / memory["plain"]["peak"],
        "memory_of_steps": memory["lean"]["step"] / memory["plain"]["step"],
    }
    return figures | (against_geometric(bench, options, share, memory["lean"]) if HAS_GEOMETRIC else {})


def against_geometric(bench: Bench, options: Any, share: float, lean_bytes: dict[str, int]) -> dict[str, Any]:
    """Speed and memory of the lean form over those of HGTConv, for one share of distinct neighbours."""
    bench.network.train()
    lean, geometric = common.in_turn(bench.train_lean, bench.train_geometric, options.repeats)
    taken = memory_of("geometric", options, share, options.tokens, options.k)
    return {
        "geometric": {
            "version": importlib.metadata.version("torch_geometric"),
            "speed": common.median_ratio(geometric, lean),
            "tokens_per_second": options.tokens / statistics.median(geometric),
            "bytes": taken,
            "memory": lean_bytes["peak"] / taken["peak"],
        }
    }


def growth(options: Any) -> dict[str, dict[int, int]]:
    """Memory of the lean form's steps, by neighbours and by tokens; all distinct, so that nothing is shared."""
    by_k = {k: memory_of("lean", options, 1.0, options.tokens, k)["step"] for k in (16, 32, 64)}
    by_tokens = {n: memory_of("lean", options, 1.0, n, options.k)["step"] for n in (128, 256, 512)}
    return {"neighbors": by_k, "tokens": by_tokens}


def main() -> None:
    """Measure both forms in turn, evaluation from stored states, and memory in processes of their own."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256, help="width of the states")
    parser.add_argument("--k", type=int, default=32, help="neighbours of a token")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the block")
    parser.add_argument("--recompute", action="store_true", help="compute neighbours' states twice, for less memory")
    parser.add_argument(
        "--memory-of", choices=("lean", "plain", "geometric"), help="print the memory of one form's steps, and end"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of distinct neighbours, with --memory-of")
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {str(share): compare(options, share, Path(folder) / str(share)) for share in SHARES}
    grown = growth(options)
    steps = {name: [b / a for a, b in zip(list(v.values()), list(v.values())[1:])] for name, v in grown.items()}
    details = {"by_share": found, "step_bytes": grown, "growth": steps}
    details["block"] = {"tokens": options.tokens, "k": options.k, "dim": options.dim, "recompute": options.recompute}
    first = found[str(SHARES[0])]
    what = f"training tokens/s, lean form to plain form, {SHARES[0]} of the neighbours distinct"
    common.tell("gnn_lm", what, first["speed"], f">= {SPEED:g}", details, options.out)
    for share, figures in found.items():
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in figures["tokens_per_second"].items())
        sys.stdout.write(
            f"  {share} distinct: speed {figures['speed']:.2f} (wanted: >= {SPEED:g}), peak memory "
            f"{figures['memory']:.3f}, of the steps alone {figures['memory_of_steps']:.3f} (<= {MEMORY:g}), evaluation "
            f"over training {figures['evaluation_over_training']:.1f} (>= {EVALUATION:g}), with the language model "
            f"over it alone {figures['evaluation_over_language_model']:.2f} (>= {OF_LM:g}); tokens/s: {rates}\n"
        )
        if "geometric" in figures:
            beside = figures["geometric"]
            sys.stdout.write(
                f"    beside HGTConv of torch_geometric {beside['version']}: speed {beside['speed']:.2f}, peak memory "
                f"{beside['memory']:.3f}; its tokens/s: {beside['tokens_per_second']:,.0f}\n"
            )
    for name, ratios in steps.items():
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        sys.stdout.write(f"  memory of a step at twice the {name}: {shown} (wanted: <= {GROWTH:g})\n")


if __name__ == "__main__":
    main()
