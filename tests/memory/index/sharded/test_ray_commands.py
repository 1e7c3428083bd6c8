"""Commands with --search-on ray: the same output as without."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fairseq.runtime import ray_cluster
from fairseq_cli import build_dstore, eval_lm, eval_lm_trime, generate, interactive, preprocess, save_datastore, train
from fairseq_cli.memory import train_combiner

try:
    ray = ray_cluster.ray_library()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
RAY = ("--search-on", "ray", "--search-workers", "3")
MODEL = (
    "--task translation --arch transformer_tiny --encoder-layers 1 --decoder-layers 1 --optimizer adam --lr 0.01 "
    "--criterion label_smoothed_cross_entropy --max-tokens 400 --share-decoder-input-output-embed --cpu "
    "--no-progress-bar --num-workers 0 --no-epoch-checkpoints --max-update 60 --disable-validation"
).split()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray for all commands, with files in a folder of its own."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, without its times."""

    def run(command: Callable[[Sequence[str]], None], *words: Any) -> str:
        capsys.readouterr()
        command([str(word) for word in words])
        lines = capsys.readouterr().out.splitlines()
        return "\n".join(line for line in lines if not line.startswith("W-") and "tokens/s" not in line)

    return run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Text, model and datastore of a translation, word by word."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (name, count) in enumerate((("train", 200), ("valid", 20), ("test", 12))):
        rng = np.random.default_rng(seed)
        lines = [rng.integers(12, size=int(rng.integers(2, 9))) for _ in range(count)]
        for language in "xy":
            text = "\n".join(" ".join(f"{language}{word}" for word in line) for line in lines)
            (folder / f"{name}.{language}").write_text(text + "\n")
    texts = [f"--{name}pref={folder / name}" for name in ("train", "valid", "test")]
    preprocess.main(["--source-lang", "x", "--target-lang", "y", *texts, "--destdir", str(folder / "bin")])
    train.main([str(folder / "bin"), *MODEL, "--save-dir", str(folder)])
    model, store = folder / "checkpoint_last.pt", folder / "store"
    words = ["--path", str(model), "--dstore-mmap", str(store), "--max-tokens", "300", "--cpu"]
    save_datastore.main([str(folder / "bin"), *words])
    return folder / "bin", model, store


def test_translations_are_those_of_one_process(pairs, output, tmp_path):
    data, model, store = pairs
    words = (data, "--path", model, "--beam", 2, "--cpu", "--knnmt", "--dstore-filename", store, "--k", 4, "--lmbda")
    plain = output(generate.main, *words, 0.6)
    assert output(generate.main, *words, 0.6, *RAY) == plain
    assert output(generate.main, *words, 0) != plain
    (tmp_path / "lines").write_text("x1 x2 x3\nx4\n")
    typed = [*words, 0.6, "--input", tmp_path / "lines"]
    assert output(interactive.main, *typed, *RAY) == output(interactive.main, *typed)


def test_a_combiner_is_trained_on_the_same_neighbours(pairs, output, tmp_path):
    data, model, store = pairs
    words = (data, "--path", model, "--cpu", "--dstore-filename", store, "--k", 4, "--max-epoch", 2)
    for name, more in (("here", ()), ("ray", RAY)):
        output(train_combiner.main, *words, "--out", tmp_path / f"{name}.safetensors", *more)
    here, there = (load_file(tmp_path / f"{name}.safetensors") for name in ("here", "ray"))
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)


@pytest.fixture(scope="module")
def language_model(trained: Path, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The words of an evaluation, and a datastore with clusters and an index."""
    store = tmp_path_factory.mktemp("store") / "d"
    words = [data_bin, "--path", trained / "checkpoint_best.pt", "--cpu", "--max-tokens", 256, "--context-window", 16]
    saving = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", store]
    eval_lm.main([str(word) for word in (*words, *saving)])
    build_dstore.main(["--dstore_mmap", str(store), "--cluster_dstore", "--num_clusters", "60"])
    build_dstore.main(["--dstore_mmap", str(store), "--faiss_index", f"{store}.index", "--index", "flat"])
    return [*words, "--gen-subset", "valid", "--dstore-filename", store, "--k", 32], store


@pytest.mark.parametrize(
    "more",
    [
        "--knnlm --lmbda 0.3",
        "--knnlm --lmbda 0.3 --retomaton",
        "--knnlm --lmbda 0.3 --indexfile {store}.index",
        "--knnlm --lmbda 0.3 --indexfile {store}.index --retomaton --no-load-keys",
    ],
)
def test_scores_are_those_of_one_process(language_model, output, tmp_path, more):
    words, store = language_model
    given = [*words, *more.format(store=store).split()]
    on_ray = RAY[:2] if "--indexfile" in more else RAY
    for name, also in (("here", ()), ("ray", on_ray)):
        output(eval_lm.main, *given, "--scores-file", tmp_path / f"{name}.npz", *also)
    here, there = (np.load(tmp_path / f"{name}.npz")["logp"] for name in ("here", "ray"))
    np.testing.assert_array_equal(here, there)


def test_trime_and_saved_neighbours_are_those_of_one_process(language_model, output, tmp_path):
    words, store = language_model
    trime = [*words, "--use-external", "--knn-sim-func", "dot", "--faiss-metric-type", "ip"]
    assert output(eval_lm_trime.main, *trime, *RAY) == output(eval_lm_trime.main, *trime)
    index = ["--indexfile", f"{store}.index", "--no-load-keys"]
    files = {}
    for name, more in (("here", ()), ("ray", RAY), ("index", index), ("index-ray", [*index, *RAY[:2]])):
        files[name] = tmp_path / name
        output(eval_lm.main, *words, "--knnlm", "--lmbda", 0.3, "--save-retrieval", files[name], *more)
    assert files["here"].read_bytes() == files["ray"].read_bytes()
    assert files["index"].read_bytes() == files["index-ray"].read_bytes()
    with pytest.raises(ValueError, match="index"):  # exact neighbours are none of an index
        output(eval_lm.main, *words, "--knnlm", "--lmbda", 0.3, "--save-retrieval", files["ray"], *index, *RAY[:2])


def test_run_clm_has_the_same_perplexity(clm, data_bin, corpus, tmp_path):
    files = ("--train_file", corpus / "train.txt", "--validation_file", corpus / "valid.txt")
    place = ("--dstore_dir", tmp_path / "store")
    clm(*files, *place, "--save_knnlm_dstore", "--eval_subset", "train")
    words = (*files, *place, "--do_eval", "--k", 16)
    for kind in ("--knn", "--retomaton"):
        here, there = clm(*words, kind), clm(*words, kind, "--search_on", "ray", "--search_workers", 3)
        figures = [[line for line in text.splitlines() if "Perplexity" in line] for text in (here, there)]
        assert figures[0]
        assert figures[0] == figures[1]
