"""build_dstore.py with the words of the published commands."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fairseq_cli import build_dstore, eval_lm

ROWS, DIM = 1500, 16


@pytest.fixture
def prefix(tmp_path) -> Path:
    keys = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
    keys.tofile(tmp_path / "dstore_keys.npy")
    keys.astype(np.float16).tofile(tmp_path / "dstore-fp16_keys.npy")
    np.arange(ROWS).tofile(tmp_path / "dstore_vals.npy")
    return tmp_path / "dstore"


def words(prefix: Path, more: str = "") -> list[str]:
    command = (
        f"--dstore_mmap {prefix} --dstore_size {ROWS} --dimension {DIM} --faiss_index {prefix.parent}/knn.index "
        f"--num_keys_to_add_at_a_time 500 --starting_point 0 --ncentroids 8 --code_size 4 {more}"
    )
    return command.split()


@pytest.mark.parametrize("more", ["--dist ip", "--dstore_fp16 --dist ip", "--dstore-fp16 --dist ip --probe 4 --seed 3"])
def test_published_command(prefix, capsys, more):
    build_dstore.main(words(prefix, more))
    out = capsys.readouterr().out
    assert out.startswith(f"indexed {ROWS} keys in ")
    assert "recall@1024" in out
    assert "bytes per key; 512 keys (training saw all of them) as queries" in out
    path = prefix.parent / "knn.index.ip"
    assert path.exists()
    record = json.loads(Path(f"{path}.run.json").read_text())
    assert record["figures"]["rows"] == ROWS
    assert record["config"]["dist"] == "ip"
    assert [name for name in record["inputs"] if name.endswith("_keys.npy")]


def test_the_perplexity_gap_is_that_of_two_evaluations(trained, data_bin, tmp_path, capsys):
    base = f"{data_bin} --path {trained / 'checkpoint_best.pt'} --cpu --max-tokens 256"
    store = tmp_path / "dstore"
    eval_lm.main(f"{base} --gen-subset train --save-knnlm-dstore --dstore-mmap {store}".split())
    evaluation = f"{base} --gen-subset valid --k 8 --lmbda 0.5"
    build = f"--dstore_mmap {store} --faiss_index {store}.index --ncentroids 16 --code_size 2 --probe 1"
    with pytest.raises(ValueError, match="--report_evaluation: --lmbda is 0, so that neighbours do not count"):
        build_dstore.main([*build.split(), "--report_evaluation", base])
    assert not Path(f"{store}.index.l2").exists()  # told before the build
    capsys.readouterr()
    build_dstore.main([*build.split(), "--report_evaluation", evaluation])
    told = re.search(r"perplexity: exact ([\d.]+), index ([\d.]+), gap (-?[\d.]+)", capsys.readouterr().out)
    exact, index, gap = map(float, told.groups())
    assert gap == pytest.approx(index - exact, abs=2e-4)
    assert exact != index
    for figure, more in ((exact, ""), (index, f"--indexfile {store}.index --probe 1")):
        eval_lm.main(f"{evaluation} --knnlm --dstore-filename {store} {more}".split())
        assert f"Perplexity: {figure:.2f}" in capsys.readouterr().out
    record = json.loads(Path(f"{store}.index.l2.run.json").read_text())
    assert record["figures"]["evaluation"]["gap"] == pytest.approx(gap, abs=1e-4)
    assert record["figures"]["report"]["probes"]


def test_parts_and_reports_as_the_words_say(prefix, capsys, monkeypatch):
    monkeypatch.setattr("fairseq.memory.index.build.preflight.BLOCK_ROWS", 500)
    build_dstore.main(words(prefix, "--num_shards 2 --shard_id 1"))
    assert capsys.readouterr().out.endswith("to be encoded yet: 0\n")
    build_dstore.main(words(prefix, "--num-shards 2 --shard-id 0 --no-report"))
    assert capsys.readouterr().out.count("\n") == 1
    build_dstore.main(words(prefix, "--num-shards 2 --merge --report-k 5 --report-queries 40 --report-probes 2,4"))
    out = capsys.readouterr().out
    assert "probe 2: recall@5 " in out
    assert "probe 4: recall@5 " in out
    assert "probe 1:" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--dist l3", "l3"),
        ("--code_size 5", "--code_size 5 does not divide the width 16"),
        ("--ncentroid 8", "unknown flag --ncentroid (did you mean"),
        ("--dstore_size 1501", "holds 96000 bytes; 1501 rows of 16 float32 values take 96064"),
        ("--dstore_mmap /nowhere/dstore", "no datastore at '/nowhere/dstore'"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(prefix, capsys, monkeypatch, more, message):
    monkeypatch.setattr(sys, "argv", ["build_dstore.py", *words(prefix, more)])
    with pytest.raises(SystemExit) as caught:
        build_dstore.cli_main()
    assert caught.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("build_dstore.py: error: ")
    assert message in told


def test_help_is_quick_and_loads_no_library():
    script = "import sys, fairseq_cli.build_dstore as b\ntry:\n b.main(['--help'])\nexcept SystemExit:\n pass\n"
    script += "print([m for m in ('torch', 'faiss', 'numpy') if m in sys.modules])"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "--num_keys_to_add_at_a_time" in out
    assert time.perf_counter() - start < 10
