"""GNN-LM by its commands: stores, neighbours, training, evaluation; compared with the plain graph transformer."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import perplexity
from gnn_commands import BAND, BASE, BLOCK, GRAPH, HEADS, K, evaluate, fill, train_graph
from plain_hgt import kept, occurrence_graph, plain_hgt

from fairseq.checkpoint_utils import load_checkpoint
from fairseq_cli import eval_lm, train, validate
from fairseq_cli.memory import neighbors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data folder, a language model, and stores of its splits with neighbours."""
    return fill(tmp_path_factory.mktemp("gnn"))


@pytest.fixture
def logps(folder, tmp_path, capsys):
    """ln p of every token of a split in the order of the text, and what was printed."""

    def run(name, *more):
        evaluate(folder, name, "--scores-file", tmp_path / "scores.npz", *more)
        with np.load(tmp_path / "scores.npz") as file:
            return file["logp"], capsys.readouterr().out

    return run


def keys_of(folder, split):
    return torch.from_numpy(raw_keys(folder / "stores" / split).astype(np.float64))


def raw_keys(store):
    return np.fromfile(f"{store}_keys.npy", np.float32).reshape(-1, 16)


def weights_of(folder, run):
    return load_checkpoint(str(folder / run / "checkpoint_last.pt")).model


def by_hand(folder, split, run, k=K, length=160):
    """ln p of the first tokens by the plain graph transformer over each block, in float64."""
    weights = {name: value.double() for name, value in weights_of(folder, run).items()}
    own = {name.removeprefix("gnn."): value for name, value in weights.items() if name.startswith("gnn.")}
    keys, features = keys_of(folder, split), keys_of(folder, "train")
    nearest = np.load(folder / "stores" / f"{split}.neighbors")[:, :k].tolist()
    text = np.fromfile(folder / "bin" / f"{split}.bin", dtype=np.uint16).astype(np.int64)
    assert len(text) == len(keys)
    found = []
    for start in range(0, min(length, len(text)), BLOCK):
        hidden, first = keys[start : start + BLOCK], start if split == "train" else None
        pairs = kept(nearest[start : start + BLOCK], len(features), BAND, first)
        cut = {"band": BAND, "first": first} if split == "train" else {}
        graph = occurrence_graph(pairs, len(hidden), 2, 2, len(features), **cut)
        token, _ = plain_hgt(own, 3, HEADS, hidden, features[graph.position], graph)
        out = hidden + token @ own["output.weight"].t()
        logp = (out @ weights["decoder.embed_tokens.weight"].t()).log_softmax(-1)
        found.append(logp[torch.arange(len(hidden)), torch.from_numpy(text[start : start + BLOCK])])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("split", ["valid", "train"])
def test_log_probabilities_are_those_of_the_plain_graph_transformer(folder, logps, split):
    wanted = by_hand(folder, split, "gnn")
    assert len(wanted) > 100
    for more in ((), ("--use-precompute-feat",)):
        found = logps("gnn", "--gen-subset", split, *more)[0]
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=2e-5)


def test_fewer_neighbours_and_stored_states_and_batches(folder, logps, tmp_path):
    whole = logps("gnn")[0]
    wanted = by_hand(folder, "valid", "gnn", 2, 48)
    np.testing.assert_allclose(logps("gnn", "--gcn-k", 2)[0][:48], wanted, atol=2e-5)
    for _ in ("written", "read"):
        stored = logps("gnn", "--graph-states", tmp_path / "states")[0]
        np.testing.assert_allclose(stored, whole, atol=2e-3)  # float16 states
    assert not np.array_equal(stored, whole)
    np.testing.assert_allclose(logps("gnn", "--max-tokens", 16)[0], whole, atol=1e-5)


def test_before_training_and_with_the_short_cut_it_is_the_language_model(folder, logps):
    plain = logps("lm")[0]
    train_graph(folder, "fresh", "--lr", 1e-12, updates=1)
    np.testing.assert_allclose(logps("fresh")[0], plain, atol=1e-6)
    short = logps("gnn", "--model-overrides", "{'short_cut': True}")[0]
    np.testing.assert_array_equal(short, plain)
    assert np.abs(logps("gnn")[0] - plain).max() > 1e-3, "training changed nothing"


def test_only_what_is_named_is_trained(folder):
    before, after = weights_of(folder, "lm"), weights_of(folder, "gnn")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    train_graph(folder, "softmax", "--train-params", "gnn+softmax", updates=2)
    changed = {name for name, value in weights_of(folder, "softmax").items() if not_equal(before.get(name), value)}
    assert {name for name in changed if not name.startswith("gnn.")} == {
        "decoder.embed_tokens.weight",  # tied to the output layer
        "decoder.output_projection.weight",
    }
    train_graph(folder, "all", "--train-params", "all", "--graph-probability", 0.5, updates=4)
    assert any("layers" in name and not_equal(before[name], weights_of(folder, "all")[name]) for name in before)


def not_equal(one, other):
    return one is not None and not torch.equal(one, other)


def test_mixed_probabilities(folder, logps):
    own, graph = logps("lm")[0], logps("gnn")[0]
    mixed = logps("gnn", "--model-overrides", "{'orig_prob_ratio': 0.3}")[0]
    np.testing.assert_allclose(np.exp(mixed), 0.3 * np.exp(own) + 0.7 * np.exp(graph), atol=1e-6)
    train_graph(folder, "mixed", "--orig-prob-ratio", 0.3, updates=2)
    assert load_checkpoint(str(folder / "mixed" / "checkpoint_last.pt")).config["model"]["orig_prob_ratio"] == 0.3


@pytest.mark.parametrize("options", [(), ("--train-params", "all", "--graph-probability", "0.5")])
def test_a_resumed_training_gives_the_same_bytes(folder, options, tmp_path):
    train_graph(folder, tmp_path / "one", *options, updates=5)
    train_graph(folder, tmp_path / "two", *options, updates=2)
    train_graph(folder, tmp_path / "two", *options, updates=5)
    one, two = weights_of(folder, tmp_path / "one"), weights_of(folder, tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_bfloat16(folder, logps, tmp_path):
    train_graph(folder, tmp_path / "half", "--bf16", updates=2)
    half = logps("gnn", "--bf16")[0]
    np.testing.assert_allclose(half.mean(), logps("gnn")[0].mean(), atol=0.01)
    for _ in ("written", "read"):
        stored = logps("gnn", "--bf16", "--graph-states", tmp_path / "states")[0]
        np.testing.assert_allclose(stored, half, atol=0.05)


def save_stores(folder, place, run, *more):
    """Stores and neighbours of both splits by another model or tap."""
    for split in ("train", "valid"):
        saving = ["--save-knnlm-dstore", "--dstore-mmap", str(place / split), "--knn-keytype", "model_output"]
        evaluate(folder, run, "--gen-subset", split, *saving, *more)
        words = ["--dstore-filename", str(place / "train"), "--k", str(K), "--invalid-neighbor-context", str(BAND)]
        neighbors.main([str(place / split), *words])
    return place


@pytest.fixture(scope="module")
def of_layer(folder, tmp_path_factory):
    """Stores of the same language model's first layer."""
    return save_stores(folder, tmp_path_factory.mktemp("layer"), "lm", "--knn-keytype", "layer_1")


def test_stores_of_another_layer_or_features_of_another_text(folder, of_layer, tmp_path):
    with pytest.raises(ValueError, match="was trained with features that are model_output, .* are layer_1"):
        evaluate(folder, "gnn", "--graph-stores", of_layer)
    with pytest.raises(ValueError, match="was trained with features that are model_output, .* are layer_1"):
        evaluate(folder, "gnn", "--graph-features", of_layer / "train")
    with pytest.raises(ValueError, match="takes the language model's output of width 16 .* holds layer_1"):
        train_graph(folder, tmp_path / "x", "--use-precompute-feat", "--graph-stores", of_layer)
    with pytest.raises(ValueError, match=r"has 143 rows, the train split's datastore .* has"):
        evaluate(folder, "gnn", "--graph-features", folder / "stores" / "valid")


def test_a_text_that_changed_after_its_store_was_saved(folder, tmp_path):
    """One token is enough, wherever it is."""
    copy = tmp_path / "bin"
    copy.mkdir()
    for path in (folder / "bin").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    text = np.fromfile(copy / "valid.bin", np.uint16)
    text[[20, 21]] = text[[21, 20]] if text[20] != text[21] else text[[20, 20]] + 1
    text.tofile(copy / "valid.bin")
    (copy / "valid.sums.json").unlink()
    words = ["--path", str(folder / "gnn" / "checkpoint_last.pt"), "--cpu", "--gen-subset", "valid"]
    with pytest.raises(ValueError, match="was saved from another text"):
        eval_lm.main([str(copy), *words])


def test_states_of_the_stores_are_not_those_of_a_language_model_that_was_trained(folder, logps, tmp_path):
    more = ("--train-params", "all")
    with pytest.raises(ValueError, match="and --train-params all changes it; give --no-use-precompute-feat"):
        train_graph(folder, tmp_path / "x", *more, "--use-precompute-feat")
    train_graph(folder, tmp_path / "all", *more, updates=2)
    with pytest.raises(ValueError, match="was trained too, and the stores hold states that it had before"):
        evaluate(folder, tmp_path / "all", "--use-precompute-feat")
    knn = ("--knnlm", "--k", 4, "--dstore-filename", folder / "stores" / "train", "--knn-keytype", "lm_output")
    with pytest.raises(ValueError, match="was saved by another model"):
        evaluate(folder, tmp_path / "all", *knn, "--strict-model")
    evaluate(folder, "gnn", *knn, "--strict-model")
    with pytest.raises(ValueError, match="no datastore holds the state of <s>"):
        evaluate(folder, "gnn", "--use-precompute-feat", "--add-bos-token")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gcn-k", 2), r"with --gcn-k None, now it is 2"),
        (("--neighbor-context", "0,1"), r"with --neighbor-context \[2, 2\], now it is \[0, 1\]"),
        (("--invalid-neighbor-context", 99), "with --invalid-neighbor-context None, now it is 99"),
        (("--use-precompute-feat",), "with --use-precompute-feat False, now it is True"),
        (("--orig-prob-ratio", 0.3), "--orig-prob-ratio 0.0, the flags ask for 0.3"),
    ],
)
def test_a_run_goes_on_with_the_graph_that_it_began_with(folder, more, message):
    with pytest.raises(ValueError, match=message):
        train_graph(folder, "gnn", *more, updates=9)
    assert load_checkpoint(str(folder / "gnn" / "checkpoint_last.pt")).progress["num_updates"] == 6


def test_a_run_goes_on_with_the_neighbours_that_it_began_with(folder, tmp_path):
    stores = shutil.copytree(folder / "stores", tmp_path / "stores")
    words = [f"{stores}/train", "--dstore-filename", f"{stores}/train", "--invalid-neighbor-context", str(BAND)]

    def train_on(*more, updates=2):
        for path in stores.glob("train.neighbors*"):
            path.unlink()
        for shard in "01":
            neighbors.main([*words, "--k", str(K), "--num-shards", "2", "--shard-id", shard, *more])
        train_graph(folder, tmp_path / "run", "--graph-stores", stores, updates=updates)

    train_graph(folder, tmp_path / "run", "--graph-stores", stores, updates=1)
    with pytest.raises(ValueError, match="neighbours of train whose metric is 'cos', that of .* is 'l2'"):
        train_on("--faiss-metric-type", "l2")
    with pytest.raises(ValueError, match="neighbours of train whose replaced is True, that of .* is False"):
        train_on("--no-replacement")
    with pytest.raises(ValueError, match=f"neighbours of train whose k is {K}, that of .* is {K + 1}"):
        train_on("--k", str(K + 1))
    train_on()  # the same search, in parts


def test_neighbours_of_rows_of_another_text_are_not_compared_by_these_keys(folder, tmp_path):
    knn = ("--knnlm", "--k", K, "--lmbda", 0.3, "--knn-keytype", "model_output")
    other = ("--dstore-filename", folder / "stores" / "valid", "--knn-neighbors")
    with pytest.raises(ValueError, match="are not of the same tokens, row by row|names row"):
        evaluate(folder, "lm", *knn, *other, folder / "stores" / "valid.neighbors")
    for end in ("", ".json"):
        (tmp_path / f"v.neighbors{end}").write_bytes((folder / "stores" / f"valid.neighbors{end}").read_bytes())
    own = ("--dstore-filename", folder / "stores" / "train", "--knn-neighbors", tmp_path / "v.neighbors")
    with pytest.raises(ValueError, match="what its rows are cannot be told; keep the file beside"):
        evaluate(folder, "lm", *knn, *own)


def test_a_context_that_reaches_beyond_the_band_is_told(folder, caplog):
    longest = json.loads((folder / "stores" / "train.json").read_text())["longest_input"]
    for context in (0, 16):
        caplog.clear()
        evaluate(folder, "gnn", "--gen-subset", "train", "--context-window", context, "--tokens-per-sample", 16)
        safe = longest + 16 + context
        assert (f"--invalid-neighbor-context {safe} is safe" in caplog.text) == (safe > BAND)
        # The search's band counts too: how many are left of those it found tells of nearer keys.
        words = ("--context-window", context, "--tokens-per-sample", 16, "--invalid-neighbor-context", 99)
        evaluate(folder, "gnn", "--gen-subset", "train", *words)
        assert (f"--invalid-neighbor-context {safe}, without" in caplog.text) == (safe > BAND)


def test_a_gnn_lm_as_a_plain_language_model(folder, tmp_path):
    start = str(folder / "gnn" / "checkpoint_last.pt")
    words = [*BASE, "--finetune-from-model", start, "--save-dir", str(tmp_path), "--max-update", "1"]
    with pytest.raises(ValueError, match="the model is a GNN-LM, which reads neighbours: train it with --arch"):
        train.main([str(folder / "bin"), *words])
    with pytest.raises(ValueError, match="--short-cut leaves the graph out"):
        train_graph(folder, tmp_path / "x", "--short-cut")


def test_a_second_stage_starts_from_the_first(folder, logps):
    train_graph(folder, "second", "--lr", 1e-12, "--gcn-k", K, updates=1, start="gnn")
    np.testing.assert_allclose(logps("second")[0], logps("gnn")[0], atol=1e-6)


def test_context_is_read_and_not_scored(folder, logps):
    """The graph's layers read all of the context, or some of it: with none, blocks stand alone for them."""
    whole, _ = logps("gnn", "--context-window", 16, "--tokens-per-sample", 8)
    same, out = logps("gnn", "--context-window", 16, "--tokens-per-sample", 8, "--gcn-context-window", 16)
    np.testing.assert_allclose(same, whole, atol=1e-5)
    words = ("--context-window", 16, "--tokens-per-sample", 8, "--gcn-context-window", 0)
    none, out = logps("gnn", *words, "--output-position-stats")
    assert np.abs(none - whole).max() > 1e-4
    small_batches = logps("gnn", *words, "--max-tokens", 8)[0]
    np.testing.assert_allclose(small_batches, none, atol=1e-5)
    places = re.findall(r"^places? (\d+)(?: to (\d+))? of a block: (\d+) tokens, perplexity", out, re.MULTILINE)
    assert [(first, last) for first, last, _ in places] == [("0", ""), ("1", "3"), ("4", "7")]
    assert sum(int(count) for _, _, count in places) == len(none)


def test_neighbours_of_the_same_model_or_of_the_one_within(folder, logps, tmp_path):
    saving = ("--save-knnlm-dstore", "--dstore-mmap", tmp_path / "second", "--knn-keytype", "model_output")
    evaluate(folder, "gnn", "--gen-subset", "train", *saving)
    knn = ("--knnlm", "--k", 8, "--lmbda", 0.3)
    second = logps("gnn", *knn, "--dstore-filename", tmp_path / "second", "--knn-keytype", "model_output")
    within = logps("gnn", *knn, "--dstore-filename", folder / "stores" / "train", "--knn-keytype", "lm_output")
    alone = logps("gnn")
    plain = logps("lm", *knn, "--dstore-filename", folder / "stores" / "train", "--knn-keytype", "model_output")
    assert not np.array_equal(second[0], within[0])
    assert perplexity(second[1]) < perplexity(alone[1])
    with pytest.raises(ValueError, match="holds keys of model_output of the GNN-LM itself, .* lm_output asks for"):
        evaluate(folder, "gnn", *knn, "--dstore-filename", tmp_path / "second", "--knn-keytype", "lm_output")
    cut = ("--dstore-mmap", tmp_path / "own", "--model-overrides", "{'short_cut': True}")  # of the model within
    evaluate(folder, "gnn", "--gen-subset", "train", *saving, *cut)
    again = logps("gnn", *knn, "--dstore-filename", tmp_path / "own", "--knn-keytype", "lm_output", "--strict-model")
    np.testing.assert_array_equal(again[0], within[0])
    # The language model within finds what it finds alone; only the other share differs.
    found = (np.exp(within[0]) - 0.7 * np.exp(alone[0])) / 0.3
    own = (np.exp(plain[0]) - 0.7 * np.exp(logps("lm")[0])) / 0.3
    np.testing.assert_allclose(found, own, atol=1e-5)


def test_kept_neighbours_are_taken_instead_of_a_search(folder, logps, tmp_path):
    """Those of the language model's own states, by cosine: the same as a search, and other ones by other keys."""
    knn = ("--knnlm", "--k", K, "--lmbda", 0.3, "--softmax-temp", 0.1, "--knn-keytype", "model_output")
    own = (*knn, "--faiss-metric-type", "cos", "--dstore-filename", folder / "stores" / "train")
    kept = ("--knn-neighbors", folder / "stores" / "valid.neighbors")
    searched = logps("lm", *own)[0]
    for more in ((), ("--max-tokens", 16), ("--knn-bulk", 20), ("--tokens-per-sample", 8, "--context-window", 8)):
        wanted = logps("lm", *own, *more)[0] if "--context-window" in more else searched
        if "--context-window" not in more:
            np.testing.assert_allclose(logps("lm", *own, *kept, *more)[0], wanted, atol=1e-5)
        else:  # other states, which find others
            assert np.isfinite(logps("lm", *own, *kept, *more)[0]).all()
    saving = ("--save-knnlm-dstore", "--dstore-mmap", tmp_path / "second", "--knn-keytype", "model_output")
    evaluate(folder, "gnn", "--gen-subset", "train", *saving)
    other = logps("gnn", *knn, "--dstore-filename", tmp_path / "second", *kept, "--save-retrieval", tmp_path / "F")[0]
    keys, own_keys = raw_keys(tmp_path / "second"), raw_keys(folder / "stores" / "train")
    assert not np.array_equal(keys, own_keys)
    assert np.abs(other - logps("gnn")[0]).max() > 0.01
    with pytest.raises(ValueError, match="neighbors"):
        evaluate(folder, "gnn", *knn, "--dstore-filename", tmp_path / "second", "--save-retrieval", tmp_path / "F")
    with pytest.raises(ValueError, match=f"neighbours are asked for and .* keeps {K}"):
        evaluate(folder, "lm", *own, *kept, "--k", K + 1)
    with pytest.raises(ValueError, match="--knn-neighbors searches nothing, and --retomaton"):
        evaluate(folder, "lm", *own, *kept, "--retomaton")


def test_saved_neighbours_belong_to_their_graph(folder, tmp_path):
    words = ["--knnlm", "--k", 4, "--dstore-filename", folder / "stores" / "train", "--knn-keytype", "lm_output"]
    evaluate(folder, "gnn", *words, "--save-retrieval", tmp_path / "kept")
    with pytest.raises(ValueError, match="graph"):
        evaluate(folder, "gnn", *words, "--save-retrieval", tmp_path / "kept", "--gcn-k", 2)


def test_all_tokens_are_saved_when_that_is_asked(folder, tmp_path):
    keys = {}
    for name, more in (("without", ()), ("with", ("--dstore-all-tokens",))):
        saving = ("--save-knnlm-dstore", "--dstore-mmap", tmp_path / name, "--context-window", 8, *more)
        evaluate(folder, "lm", *saving, "--tokens-per-sample", 8)
        keys[name] = raw_keys(tmp_path / name)
    text = np.fromfile(folder / "bin" / "valid.bin", dtype=np.uint16)
    assert len(keys["with"]) == len(text) == len(keys["without"]) + 8
    np.testing.assert_array_equal(keys["with"][8:], keys["without"])
    np.testing.assert_array_equal(np.fromfile(tmp_path / "with_vals.npy", np.int64)[:8], text[:8])


MISTAKES = {
    "no stores": (["--graph-stores", ""], "give --graph-stores FOLDER"),
    "k": (["--gcn-k", "9"], f"9 neighbours are asked for and .*valid.neighbors keeps {K}"),
    "no base": ([], "it was never trained; give --finetune-from-model"),
    "states in training": (["--graph-states", "x"], "--graph-states are those of fixed weights"),
    "coin": (["--graph-probability", "0.5"], "--train-params gnn leaves it as it is"),
    "heads": (["--graph-attention-heads", "3"], "--graph-attention-heads 3 does not divide the width 16"),
    "share": (["--orig-prob-ratio", "1"], "--orig-prob-ratio 1.0 is not in"),
    "coins of processes": (
        ["--graph-probability", "0.5", "--train-params", "all", "--strategy", "fsdp"],
        "--graph-probability 0.5 with --strategy fsdp: processes whose coins differ would wait .* give --strategy ddp",
    ),
    "another graph": (
        ["--graph-layer", "2", "--graph-dropout", "0.2"],
        r"gnn/checkpoint_last.pt: .* asks for --graph-layer 2 \(the checkpoint has 3\); give what it has, or start",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(folder, name, tmp_path):
    more, message = MISTAKES[name]
    start = {"no base": "", "another graph": "gnn"}.get(name, "lm")
    with pytest.raises(ValueError, match=message) as told:
        train_graph(folder, tmp_path / "run", *more, start=start)
    assert "--model-overrides" not in str(told.value)
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_band_that_is_too_narrow_is_told_with_the_safe_one(folder, caplog, tmp_path):
    train_graph(folder, tmp_path / "run", updates=1)
    said = [record.getMessage() for record in caplog.records if "is safe" in record.getMessage()]
    longest = json.loads((folder / "stores" / "train.json").read_text())["longest_input"]
    assert all(f"--invalid-neighbor-context {longest + BLOCK} is safe" in line for line in said)
    assert bool(said) == (longest + BLOCK > BAND)


def test_options_of_a_graph_without_one(folder, validated):
    for command in (evaluate, validated):
        with pytest.raises(ValueError, match="--gcn-k is for a GNN-LM, and .* is none"):
            command(folder, "lm", "--gcn-k", 2)


@pytest.fixture
def validated(caplog):
    """The loss that validate.py reports, in bits."""
    caplog.set_level("INFO")

    def run(folder, run, *more):
        caplog.clear()
        path = str(folder / run / "checkpoint_last.pt")
        validate.main([str(folder / "bin"), "--path", path, "--cpu", "--log-format", "json", *map(str, more)])
        (figures,) = (json.loads(line) for line in caplog.messages if line.startswith("{"))
        return figures["valid_loss"]

    return run


def test_validation_reads_the_stores_that_it_is_given(folder, of_layer, validated, logps, tmp_path):
    reported = load_checkpoint(str(folder / "gnn" / "checkpoint_last.pt")).progress["figures"]["loss"]
    shutil.copytree(folder / "stores", tmp_path / "moved")
    moved = ("--graph-stores", tmp_path / "moved")
    for more in ((), moved, ("--use-precompute-feat",)):
        assert validated(folder, "gnn", *more) == pytest.approx(reported, abs=6e-4)
    fewer = logps("gnn", "--gcn-k", 1)[0]
    assert validated(folder, "gnn", "--gcn-k", 1, *moved) == pytest.approx(-fewer.mean() / np.log(2), abs=6e-4)
    short = ("--model-overrides", "{'short_cut': True}")
    assert validated(folder, "gnn", *short) == pytest.approx(-logps("lm")[0].mean() / np.log(2), abs=6e-4)
    with pytest.raises(ValueError, match="--gcn-k is for a GNN-LM, and .* is taken without its graph"):
        validated(folder, "gnn", *short, "--gcn-k", 1)
    with pytest.raises(ValueError, match="was trained with features that are model_output, .* are layer_1"):
        validated(folder, "gnn", "--graph-stores", of_layer)
    with pytest.raises(ValueError, match="--gcn-k must be at least 1, got 0"):
        validated(folder, "gnn", "--gcn-k", 0)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("fsdp",), ("fsdp", "--use-precompute-feat"), ("ddp",)])
def test_a_process_without_a_batch_takes_part_in_the_step(folder, two_ranks, tmp_path, more):
    """Of an odd number of batches one process has none at the end of an epoch, and the others wait for it."""
    num_blocks = -(-np.fromfile(folder / "bin" / "train.bin", np.uint16).size // BLOCK)
    assert -(-num_blocks // 7) % 2 == 1
    words = [folder / "bin", *BASE, *GRAPH, "--max-epoch", 2, "--dropout", 0, "--graph-dropout", 0, *more[1:]]
    words += ["--max-tokens", 7 * BLOCK, "--required-batch-size-multiple", 1, "--graph-stores", folder / "stores"]
    words += ["--finetune-from-model", folder / "lm" / "checkpoint_last.pt", "--save-dir"]
    two_ranks(*words, tmp_path / "two", "--strategy", more[0])
    train.main(list(map(str, [*words, tmp_path / "one", "--update-freq", 2])))
    one, two = (load_checkpoint(str(tmp_path / name / "checkpoint_last.pt"), whole=True) for name in ("one", "two"))
    assert one.progress["num_updates"] == two.progress["num_updates"] > 1
    assert two.progress["figures"]["loss"] == pytest.approx(one.progress["figures"]["loss"], abs=1e-5)
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=1e-5)


def test_stores_of_another_text_or_search(folder, tmp_path):
    other = tmp_path / "stores"
    other.mkdir()
    for path in (folder / "stores").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "valid.neighbors").write_bytes((folder / "stores" / "train.neighbors").read_bytes())
    (other / "valid.neighbors.json").write_bytes((folder / "stores" / "train.neighbors.json").read_bytes())
    with pytest.raises(ValueError, match="holds neighbours of"):
        evaluate(folder, "gnn", "--graph-stores", other)
    for name in ("valid.json", "valid_keys.npy", "valid_vals.npy", "valid_docs.npy"):
        (other / name).write_bytes((folder / "stores" / name.replace("valid", "train")).read_bytes())
    with pytest.raises(ValueError, match="was saved from another text"):
        evaluate(folder, "gnn", "--graph-stores", other)
