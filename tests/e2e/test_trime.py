"""TRIME as a user runs it: train with each batching, evaluate with each memory, and what mistakes are told.

Most commands are run in this process: starting Python costs more than all of them together.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, Command, perplexity

from fairseq.checkpoint_utils import load_checkpoint, load_model
from fairseq_cli import build_dstore, eval_lm, eval_lm_trime, train
from fairseq_cli.entry import run

pytestmark = pytest.mark.slow

MAINS = {"train.py": train, "eval_lm.py": eval_lm, "eval_lm-trime.py": eval_lm_trime, "build_dstore.py": build_dstore}
CONTEXT, BLOCK, EOS, PAD, K = 16, 16, 2, 1, 32
EVAL = ("--cpu", "--gen-subset", "valid", "--max-tokens", 64, "--context-window", CONTEXT, "--softmax-batch", 64)
LOCAL = ("--use-local", "--softmax-temp", 1.17)
LONG = (*LOCAL, "--use-long", "--mem-size", 64)
INTERP = ("--use-interp", "--interp-temp", 2.5, "--lmbda", 0.3)

Folder = Callable[[str], Path]
Score = Callable[..., np.ndarray[Any, Any]]
Oracle = Callable[[str], Score]


def run_here(program: str, *words: object, expect: int = 0) -> tuple[str, str]:
    """Run a command in this process; returns what it printed and what it complained."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(program, MAINS[program].main, [str(word) for word in words])
        except SystemExit as end:
            code = end.code
    assert code == expect, f"exit {code}\n{out.getvalue()[-2000:]}\n{err.getvalue()[-3000:]}"
    return out.getvalue(), err.getvalue()


def assert_told(program: str, *words: object, told: str) -> None:
    """The command stops with exit status 2 and one line that says why."""
    out, err = run_here(program, *words, expect=2)
    assert told in err
    assert err.startswith(f"{program}: error: ")
    assert err.count("\n") == 1
    assert not out


def training(data_bin: Path, save_dir: Path, criterion: str, *more: object) -> list[object]:
    steps = ("--lr", 0.03, "--warmup-updates", 30, "--clip-norm", 1, "--dropout", 0, "--max-epoch", 3)
    where = (data_bin, "--save-dir", save_dir, "--no-epoch-checkpoints")
    return [*where, *TINY_MODEL, *steps, "--criterion", criterion, *more]


@pytest.fixture(scope="module")
def batch_file(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a file for --predefined-batches: all blocks in a drawn order, changed by a function."""

    def write(change: Callable[[list[int]], list[int]] = list) -> Path:
        num_blocks = -(-len(np.fromfile(data_bin / "train.bin", dtype=np.uint16)) // 32)
        order = np.random.default_rng(5).permutation(num_blocks).tolist()
        path = tmp_path_factory.mktemp("batches") / "batches.json"
        path.write_text(json.dumps(change(order)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def trained_with(
    data_bin: Path, batch_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Folder]:
    """Folder of a model trained in a named way; each is trained once, when it is first asked for."""
    ways: dict[str, tuple[object, ...]] = {
        "local": ("trime_loss", "--knn-keytype", "last_ffn_input"),
        "long": ("trime_long_loss_same_device", "--keep-order", "--train-mem-size", 128),
        "external": ("trime_ext_loss", "--predefined-batches", batch_file(), "--cross-sent-ratio", 0.5),
        "head": ("trime_long_loss", "--keep-order", "--knn-keytype", "separated_head"),
    }
    done: dict[str, Path] = {}

    def train_once(way: str) -> Path:
        if way not in done:
            folder = tmp_path_factory.mktemp(way)
            run_here("train.py", *training(data_bin, folder, *ways[way]))
            done[way] = folder
        return done[way]

    return train_once


class Store(NamedTuple):
    """A datastore of the training text, and the flags of an evaluation that uses it with an exact index."""

    prefix: Path
    words: tuple[object, ...]
    keys: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def store(trained_with: Folder, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    prefix = tmp_path_factory.mktemp("store") / "dstore"
    words = ("--cpu", "--gen-subset", "train", "--max-tokens", 128, "--context-window", CONTEXT)
    saving = ("--save-knnlm-dstore", "--dstore-mmap", prefix, "--knn-keytype", "last_ffn_input")
    run_here("eval_lm.py", data_bin, "--path", trained_with("external") / "checkpoint_last.pt", *words, *saving)
    kind = ("--dist", "ip", "--index", "flat")
    run_here("build_dstore.py", "--dstore_mmap", prefix, "--faiss_index", f"{prefix}.flat", *kind)
    flags = ("--use-external", "--dstore-filename", prefix, "--indexfile", f"{prefix}.flat", "--k", K)
    keys = np.fromfile(f"{prefix}_keys.npy", dtype=np.float32).reshape(-1, 16).astype(np.float64)
    values = np.fromfile(f"{prefix}_vals.npy", dtype=np.int64)
    return Store(prefix, (*flags, "--faiss-metric-type", "ip"), keys, values)


@pytest.fixture
def score(trained_with: Folder, data_bin: Path, tmp_path: Path) -> Score:
    """Evaluate a model trained in a named way; returns ln p of every scored token."""

    def evaluate(way: str, *more: object, name: str = "checkpoint_last.pt") -> np.ndarray[Any, Any]:
        words = ("--path", trained_with(way) / name, *EVAL, "--scores-file", tmp_path / "scores.npz")
        out, _ = run_here("eval_lm-trime.py", data_bin, *words, *more)
        with np.load(tmp_path / "scores.npz") as file:
            logp: np.ndarray[Any, Any] = file["logp"]
        assert perplexity(out) == pytest.approx(float(np.exp(-logp.mean())), abs=0.006)
        return logp

    return evaluate


class Block(NamedTuple):
    """Tokens that are read, and those of them that are scored."""

    number: int
    context: list[int]
    source: list[int]
    target: list[int]


def text_of(data_bin: Path) -> list[int]:
    tokens: list[int] = np.fromfile(data_bin / "valid.bin", dtype=np.uint16).tolist()
    return tokens


def blocks_of(text: list[int], edges: list[int], limit: int = 10**6) -> list[Block]:
    """The text cut at ``edges``; blocks of more than ``limit`` tokens are left out and are context for none."""
    read = [EOS, *text]
    blocks: list[Block] = []
    for number, (start, end) in enumerate(zip(edges, edges[1:])):
        if end - start <= limit:
            before = [token for block in blocks for token in block.source]
            room = min(CONTEXT, BLOCK + CONTEXT - (end - start))
            blocks.append(Block(number, before[max(0, len(before) - room) :], read[start:end], text[start:end]))
    return blocks


def equal_blocks(data_bin: Path) -> list[Block]:
    text = text_of(data_bin)
    return blocks_of(text, [*range(0, len(text), BLOCK), len(text)])


def edges_of_whole_lines(text: list[int]) -> list[int]:
    """Blocks of whole lines, as many as fit; a longer line is a longer block."""
    ends = [place + 1 for place, token in enumerate(text) if token == EOS]
    edges = [0]
    for last, end in zip([0, *ends], ends):
        if end - edges[-1] > BLOCK and last > edges[-1]:
            edges.append(last)
    return [*edges, len(text)]


class Published:
    """The log-probabilities of arXiv 2205.12674 (and of its program), token by token over the states of a model."""

    temperature, interp_temperature, weight = 1.17, 2.5, 0.3

    def __init__(self, folder: Path, data_bin: Path) -> None:
        size = 4 + len((data_bin / "dict.txt").read_text().splitlines())
        model = load_model(load_checkpoint(str(folder / "checkpoint_last.pt")), size, PAD, {})
        self.model = model.eval().requires_grad_(False)

    def own(self, hidden_D: torch.Tensor, token: int) -> tuple[float, float]:
        """ln p of the token by the vocabulary, and the log-sum of the adaptive softmax's head."""
        softmax = self.model.decoder.adaptive_softmax
        head = softmax.head(hidden_D[None])[0].double()
        norm = head.logsumexp(0).item()
        if token < 20:
            return head[token].item() - norm, norm
        tail, start = (0, 20) if token < 40 else (1, 40)
        logp = head[20 + tail].item() - norm
        if token - start != PAD:  # the original takes the second type of a tail for padding
            logp += softmax.tail[tail](hidden_D[None])[0].double().log_softmax(0)[token - start].item()
        return logp, norm

    def states(self, block: Block, tap: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor([[*block.context, *block.source]])
        out = self.model(tokens, key_tap="last_ffn_input")
        key_TD = out.key_BTD[0]
        if tap == "separated_head":
            key_TD = key_TD @ self.model.decoder.separated_head.weight.T
        return out.hidden_BTD[0], key_TD

    def joint(self, own: tuple[float, float], scores: list[float], tokens: list[int], target: int) -> float:
        """ln of the target's share where vocabulary and memories are normalised together."""
        logp, norm = own
        hit = sum(math.exp(score) for score, token in zip(scores, tokens) if token == target)
        whole = sum(math.exp(score) for score in scores)
        return math.log((math.exp(logp + norm) + hit) / (math.exp(norm) + whole))

    def __call__(
        self,
        blocks: list[Block],
        *,
        local: bool = True,
        mem_size: int = 0,
        dedup: bool = False,
        store: Store | None = None,
        mode: str = "gn",
        tap: str = "last_ffn_input",
    ) -> np.ndarray[Any, Any]:
        result, last = [], -1
        long: list[tuple[list[float], int]] = []  # key and token
        for block in blocks:
            hidden_TD, key_TD = self.states(block, tap)
            following = [*block.context, *block.source, block.target[-1]][1:]
            own = list(zip(key_TD.tolist(), following))
            first = len(block.context)
            long = long if last == block.number - 1 else []
            seen = long[: max(0, len(long) - first)] if dedup else long
            for n in range(first, len(own)):
                near = [*seen, *(own[:n] if local else [])]
                root = math.sqrt(len(own[n][0])) * self.temperature
                products = np.array([key for key, _ in near]).reshape(-1, len(own[n][0])) @ own[n][0]
                scores, tokens = (products / root).tolist(), [token for _, token in near]
                far, far_tokens = self.nearest(store, own[n][0])
                if mode != "li":
                    scores += [score / root for score in far]
                    tokens += far_tokens
                logp = self.joint(self.own(hidden_TD[n], following[n]), scores, tokens, following[n])
                if mode != "gn":
                    logp = self.interpolated(logp, far, far_tokens, following[n])
                result.append(logp)
            long = (long + own[first:])[-mem_size:] if mem_size else []
            last = block.number
        return np.array(result)

    def nearest(self, store: Store | None, key: list[float]) -> tuple[list[float], list[int]]:
        """Inner products and tokens of the rows of a store that are closest."""
        if store is None:
            return [], []
        products = store.keys @ key
        best = np.argsort(-products)[:K]
        return products[best].tolist(), store.values[best].tolist()

    def interpolated(self, logp: float, far: list[float], tokens: list[int], target: int) -> float:
        shares = [math.exp(score / self.interp_temperature) for score in far]
        p_far = sum(share for share, token in zip(shares, tokens) if token == target) / sum(shares)
        return math.log((1 - self.weight) * math.exp(logp) + self.weight * p_far)


@pytest.fixture
def published(trained_with: Folder, data_bin: Path) -> Oracle:
    """The oracle of a model trained in a named way."""
    return lambda way: Published(trained_with(way), data_bin)


@pytest.mark.parametrize("way", ["local", "long", "external", "head"])
def test_training_learns_more_than_how_frequent_words_are(trained_with: Folder, data_bin: Path, way: str) -> None:
    manifest = json.loads((trained_with(way) / "train.run.json").read_text())
    share = np.unique(text_of(data_bin), return_counts=True)[1] / len(text_of(data_bin))
    assert manifest["figures"]["best"] < -(share * np.log2(share)).sum() - 0.2


def test_validation_of_trime_loss_is_the_evaluation_with_local_memory(trained_with: Folder, score: Score) -> None:
    """Two ways through the program to one figure: the loss that is trained, and the memories of evaluation."""
    best = json.loads((trained_with("local") / "train.run.json").read_text())["figures"]["best"]
    logp = score("local", "--context-window", 0, "--use-local", "--fix-tail-pads", name="checkpoint_best.pt")
    assert -logp.mean() / math.log(2) == pytest.approx(best, abs=1e-3)


MEMORIES: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "local": (LOCAL, {}),
    "local and long": (LONG, {"mem_size": 64}),
    "a long memory longer than the text": ((*LONG, "--mem-size", 5000), {"mem_size": 5000}),
    "each token once": ((*LONG, "--dedup-memory"), {"mem_size": 64, "dedup": True}),
    "long alone": (LONG[1:], {"mem_size": 64, "local": False}),
}
EXTERNAL: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "external alone": (LOCAL[1:], {"local": False}),
    "all": (LONG, {"mem_size": 64}),
    "all, mixed in as well": ((*LONG, *INTERP), {"mem_size": 64, "mode": "gnli"}),
    "gnli": ((*LOCAL, *INTERP[1:], "--mode", "gnli"), {"mode": "gnli"}),
    "li": ((*LONG, *INTERP[1:], "--mode", "li"), {"mem_size": 64, "mode": "li"}),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_memories_of_the_text_are_those_of_the_paper(
    published: Oracle, data_bin: Path, score: Score, name: str
) -> None:
    """Oracle: the formula in Python numbers, position by position; the text's blocks are cut by hand too."""
    words, settings = MEMORIES[name]
    wanted = published("long")(equal_blocks(data_bin), **settings)
    np.testing.assert_allclose(score("long", *words), wanted, atol=1e-4)


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_memory_is_that_of_the_paper(
    published: Oracle, data_bin: Path, store: Store, score: Score, name: str
) -> None:
    """The same oracle; neighbours by brute force over the stored keys."""
    words, settings = EXTERNAL[name]
    wanted = published("external")(equal_blocks(data_bin), store=store, **settings)
    for keys in ((), ("--no-load-keys",)):
        np.testing.assert_allclose(score("external", *words, *store.words, *keys), wanted, atol=1e-4)


def test_left_out_blocks_empty_the_long_memory(published: Oracle, data_bin: Path, score: Score) -> None:
    """Blocks of whole lines, as in the published commands, some of them longer than the model may read."""
    edges = edges_of_whole_lines(text_of(data_bin))
    blocks = blocks_of(text_of(data_bin), edges, limit=18)
    assert 3 < len(edges) - 1 - len(blocks) < len(blocks)
    ours = score("long", *LONG, "--sample-break-mode", "complete", "--max-target-positions", 18)
    np.testing.assert_allclose(ours, published("long")(blocks, mem_size=64), atol=1e-4)


def test_a_compressed_index_does_without_the_keys(store: Store, score: Score, tmp_path: Path) -> None:
    """The published setting: nothing but the index and the values is read."""
    sizes = ("--dist", "ip", "--ncentroids", 8, "--code_size", 8, "--probe", 8)
    run_here("build_dstore.py", "--dstore_mmap", store.prefix, "--faiss_index", tmp_path / "knn.index", *sizes)
    for end in (".json", "_vals.npy"):
        (tmp_path / f"dstore{end}").write_bytes(Path(f"{store.prefix}{end}").read_bytes())
    names = ("--dstore-filename", tmp_path / "dstore", "--indexfile", tmp_path / "knn.index", "--no-load-keys")
    exact, plain = score("external", *LONG, *store.words, *INTERP), score("external", *LONG)
    compressed = score("external", *LONG, *store.words, *INTERP, *names, "--probe", 8)
    assert np.abs(compressed - exact).mean() < 0.5 * np.abs(plain - exact).mean()
    assert not np.allclose(compressed, exact, atol=1e-4)


@pytest.mark.parametrize("external", [False, True])
def test_batch_size_changes_nothing(store: Store, score: Score, external: bool) -> None:
    words = (*LONG, *store.words, *INTERP) if external else LONG
    one = score("external", *words, "--max-sentences", 1)
    assert len(one) > 20 * BLOCK
    for more in (("--max-sentences", 4, "--max-tokens", 10**6), ("--knn-bulk", 50, "--num-workers", 2)):
        np.testing.assert_allclose(score("external", *words, *more), one, atol=1e-5)


def test_holding_each_token_once_makes_a_difference(score: Score) -> None:
    twice, once, local = score("long", *LONG), score("long", *LONG, "--dedup-memory"), score("long", *LOCAL)
    np.testing.assert_allclose(twice[:BLOCK], local[:BLOCK], atol=1e-5)  # nothing is behind the first block
    assert (np.abs(twice - once)[BLOCK:] > 1e-6).mean() > 0.9
    np.testing.assert_allclose(once[: 2 * BLOCK], local[: 2 * BLOCK], atol=1e-5)  # all behind the second is its context
    assert (np.abs(local - once)[2 * BLOCK :] > 1e-6).mean() > 0.9


def test_no_memory_is_the_language_model(trained_with: Folder, data_bin: Path, score: Score, tmp_path: Path) -> None:
    ours, as_published = score("local", "--fix-tail-pads"), score("local")
    words = ("--path", trained_with("local") / "checkpoint_last.pt", *EVAL, "--scores-file", tmp_path / "plain.npz")
    run_here("eval_lm.py", data_bin, *words)
    with np.load(tmp_path / "plain.npz") as file:
        np.testing.assert_allclose(ours, file["logp"], atol=1e-6)
        changed = np.isin(file["target"], [21, 41])
    assert changed.any()
    np.testing.assert_array_equal(as_published[~changed], ours[~changed])
    assert (as_published[changed] > ours[changed]).all()


def test_a_separated_head_trains_and_is_the_key(
    trained_with: Folder, published: Oracle, data_bin: Path, score: Score, tmp_path: Path
) -> None:
    words = ("--keep-order", "--knn-keytype", "separated_head", "--max-update", 1, "--disable-validation")
    run_here("train.py", *training(data_bin, tmp_path, "trime_long_loss", *words))
    paths = [folder / "checkpoint_last.pt" for folder in (trained_with("head"), tmp_path)]
    long, short = (torch.load(p, weights_only=True)["model"]["decoder.separated_head.weight"] for p in paths)
    assert (long - short).abs().max() > 0.01
    for tap, more in (("separated_head", ()), ("last_ffn_input", ("--knn-keytype", "last_ffn_input"))):
        wanted = published("head")(equal_blocks(data_bin), mem_size=64, tap=tap)
        np.testing.assert_allclose(score("head", *LONG, *more), wanted, atol=1e-4)


def test_the_script_itself(trained_with: Folder, data_bin: Path, command: Command) -> None:
    words = (data_bin, "--path", trained_with("long") / "checkpoint_last.pt", *EVAL, *LONG)
    lines = command("eval_lm-trime.py", *words).stdout.splitlines()
    assert lines[0].startswith("Evaluated ")
    assert 2 < perplexity(lines[1]) < 60
    assert lines[2].startswith("scored ")
    assert any(line.startswith("seen 10 to 99 times in training: ") for line in lines[3:])
    done = command("eval_lm-trime.py", *words, "--mem-size", 8, expect=2)
    assert done.stderr.startswith("eval_lm-trime.py: error: --mem-size 8 is less than --context-window 16")


EXTERNALLY = ("--use-external", "--dstore-filename", "nowhere")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--use-local", "--use-long", "--mem-size", 8), "--mem-size 8 is less than --context-window 16"),
        (("--use-local", "--use-long"), "--use-long needs --mem-size TOKENS of at least 1, got 0"),
        (("--use-local", "--use-long", "--mem-size", -5), "--use-long needs --mem-size TOKENS of at least 1, got -5"),
        (("--use-local", "--mem-size", 64), "--mem-size 64 is the size of the long-term memory: give --use-long too"),
        (("--use-local", "--dedup-memory"), "--dedup-memory is about tokens in both --use-local and --use-long"),
        (("--use-local", "--use-interp"), "--use-interp mixes in the external memory: give --use-external"),
        (("--use-local", "--mode", "li"), "--mode li mixes in the external memory: give --use-external"),
        (("--use-local", "--mode", "gnil"), "--mode"),
        (("--use-local", "--lmbda", 0.3), "--lmbda 0.3 has no effect without --use-interp"),
        ((*EXTERNALLY, "--lmbda", 0.3), "--lmbda 0.3 has no effect without --use-interp"),
        ((*EXTERNALLY, "--use-interp", "--lmbda", 1.3), "--lmbda 1.3 is not in [0, 1]"),
        ((*EXTERNALLY, "--use-interp", "--interp-temp", 0), "--interp-temp must be at least 1e-06, got 0.0"),
        ((*EXTERNALLY, "--no-load-keys"), "an index of metric 'l2' gives another one: leave out --no-load-keys"),
        ((*EXTERNALLY, "--no-load-keys", "--faiss-metric-type", "cos"), "an index of metric 'cos' gives another one"),
        ((*EXTERNALLY, "--knn-sim-func", "do_not_recomp_l2"), "leave out --knn-sim-func do_not_recomp_l2"),
        (("--use-external",), "give --dstore-filename PREFIX"),
        (EXTERNALLY, "nowhere"),
        (("--knnlm",), "--knnlm belongs to eval_lm.py, not to eval_lm-trime.py"),
        (("--use-locale",), "unknown flag --use-locale (did you mean '--use-local'?)"),
        (("--use-local", "--knn-keytype", "separated_head"), "the model was trained without that head"),
        (("--use-local", "--knn-keytype", "last_ffn"), "'last_ffn' is none of last_ffn_input"),
    ],
)
def test_mistakes_are_told_in_one_line(
    trained_with: Folder, data_bin: Path, words: tuple[object, ...], told: str
) -> None:
    base = (data_bin, "--path", trained_with("local") / "checkpoint_last.pt", *EVAL)
    assert_told("eval_lm-trime.py", *base, *words, told=told)


def test_a_store_that_does_not_fit_is_refused(trained_with: Folder, data_bin: Path, store: Store) -> None:
    def told(way: str, message: str, *more: object) -> None:
        path = trained_with(way) / "checkpoint_last.pt"
        assert_told("eval_lm-trime.py", data_bin, "--path", path, *EVAL, *store.words, *more, told=message)

    told("head", "holds keys of last_ffn_input; --knn-keytype says separated_head")
    told("external", "holds keys of last_ffn_input; --knn-keytype says model_output", "--knn-keytype", "model_output")
    told("external", "ip is there: give --faiss-metric-type ip", "--faiss-metric-type", "l2")
    told("external", f"--k {10**6} is larger than the datastore", "--k", 10**6)
    told("external", "holds float32 keys and --dstore-fp16 was given", "--dstore-fp16")


def test_mistakes_about_the_command_or_the_model(trained_with: Folder, data_bin: Path) -> None:
    path = trained_with("local") / "checkpoint_last.pt"
    for word in ("--use-local", "--use-long", "--use-external", "--fix-tail-pads"):
        told = f"{word} belongs to eval_lm-trime.py, not to eval_lm.py"
        assert_told("eval_lm.py", data_bin, "--path", path, *EVAL, word, told=told)
    words = (data_bin, "--path", f"{path}:{path}", *EVAL, "--use-local")
    assert_told("eval_lm-trime.py", *words, told="keys come from one model, --path names 2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda order: order[:-2], "holds {short} blocks, the training data has {blocks}"),
        (lambda order: [*order, 0], "holds {long} blocks, the training data has {blocks}"),
        (lambda order: [order[1], *order[1:]], "holds 1 blocks more than once ({second}) and 1 not at all ({first})"),
        (lambda order: [len(order) if block == 0 else block for block in order], "holds block {blocks}; the training"),
        (lambda order: [str(block) for block in order], "items that are not block numbers"),
    ],
    ids=["too short", "too long", "repeated", "unknown", "strings"],
)
def test_a_batch_file_that_does_not_fit_is_refused(
    data_bin: Path, batch_file: Callable[..., Path], tmp_path: Path, change: Any, told: str
) -> None:
    first, second, *others = json.loads(batch_file().read_text())
    blocks = 2 + len(others)
    told = told.format(blocks=blocks, short=blocks - 2, long=blocks + 1, first=first, second=second)
    more = ("--predefined-batches", batch_file(change))
    assert_told("train.py", *training(data_bin, tmp_path / "model", "trime_ext_loss", *more), told=told)
    assert not list((tmp_path / "model").glob("*.pt"))


@pytest.mark.parametrize(
    ("criterion", "more", "told"),
    [
        ("trime_long_loss", ("--keep-order", "--train-mem-size", 300), "300 is not a multiple of --max-tokens 128"),
        ("trime_long_loss", ("--train-mem-size", 256), "add --keep-order"),
        ("trime_ext_loss", ("--keep-order", "--predefined-batches", "x"), "exclude each other"),
        ("trime_ext_loss", ("--predefined-batches", "nowhere.json"), "no such file: nowhere.json"),
        ("trime_ext_loss", ("--cross-sent-ratio", 1.5), "--cross-sent-ratio must lie in [0, 1], got 1.5"),
        ("trime_loss", ("--cross-sent-ratio", 0.5), "belongs to --criterion trime_ext_loss, not to trime_loss"),
        ("trime_loss", ("--ce-warmup-epoch", -1), "--ce-warmup-epoch must not be negative, got -1"),
        ("trime_loss", ("--knn-keytype", "separate_head"), "separate_head"),
    ],
)
def test_mistakes_in_training_are_told_in_one_line(
    data_bin: Path, tmp_path: Path, criterion: str, more: tuple[object, ...], told: str
) -> None:
    assert_told("train.py", *training(data_bin, tmp_path / "model", criterion, *more), told=told)
