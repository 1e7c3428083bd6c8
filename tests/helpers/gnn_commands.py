"""A GNN-LM by its commands: a language model, the stores of its splits with neighbours, and the model with a graph."""

from __future__ import annotations

from conftest import write_corpus

from fairseq_cli import eval_lm, preprocess, train
from fairseq_cli.memory import neighbors

HEADS, K, BLOCK, BAND = 2, 4, 16, 40
BASE = (
    "--decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --dropout 0.1 "
    "--optimizer adam --lr 0.01 --tokens-per-sample 16 --max-tokens 128 --cpu --no-progress-bar --num-workers 0 "
    "--no-epoch-checkpoints --share-decoder-input-output-embed"
).split()
GRAPH = f"--arch transformer_lm_gnn --graph-attention-heads {HEADS} --graph-dropout 0.1".split()


def fill(folder):
    """Make in a folder a data folder, a language model, and stores of its splits with neighbours."""
    for seed, (split, lines) in enumerate((("train", 50), ("valid", 12))):
        write_corpus(folder / f"{split}.txt", lines, seed)
    texts = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid")]
    preprocess.main(["--only-source", *texts, "--destdir", str(folder / "bin")])
    train.main([str(folder / "bin"), *BASE, "--max-update", "20", "--save-dir", str(folder / "lm")])
    (folder / "stores").mkdir()
    for split in ("train", "valid"):
        store = str(folder / "stores" / split)
        saving = ["--save-knnlm-dstore", "--dstore-mmap", store, "--knn-keytype", "model_output"]
        evaluate(folder, "lm", "--gen-subset", split, *saving)
        words = ["--dstore-filename", str(folder / "stores" / "train"), "--k", str(K)]
        neighbors.main([store, *words, "--invalid-neighbor-context", str(BAND)])
    train_graph(folder, "gnn")
    return folder


def evaluate(folder, run, *more):
    path = str(folder / run / "checkpoint_last.pt")
    words = ["--path", path, "--cpu", "--max-tokens", "64", "--tokens-per-sample", str(BLOCK)]
    eval_lm.main([str(folder / "bin"), *words, "--gen-subset", "valid", *map(str, more)])


def train_graph(folder, run, *more, updates=6, start="lm"):
    begin = ["--finetune-from-model", str(folder / start / "checkpoint_last.pt")] if start else []
    words = [*GRAPH, "--max-update", str(updates), "--save-dir", str(folder / run), "--graph-stores"]
    train.main([str(folder / "bin"), *BASE, *words, str(folder / "stores"), *begin, *map(str, more)])
