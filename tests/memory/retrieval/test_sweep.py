"""A sweep against separate evaluations of each setting, and against the formulas written out in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.config import UnreadableError
from fairseq.memory.combiners.joint import JointNormalization
from fairseq.memory.retrieval.file import Retrieval
from fairseq.memory.retrieval.sweep import Grid, Result, Setting, at, best_of, language_model_alone, open_all, sweep
from fairseq.memory.retrieval.sweep_config import SweepConfig, count_grid, number_grid
from fairseq.memory.retrieval.writer import RetrievalWriter
from fairseq.memory.sources.external import by_row_where_equal
from fairseq.memory.types import Candidates, LogSums, Neighbors
from fairseq.metrics.word_loss import LossSums, loss_sums

N, K, TYPES, DIM = 50, 12, 9, 4
KNN = {"joint": False, "text_digest": "valid", "subset": "valid", "shard": [0, 1], "dim": DIM, "model_digest": "m"}
ABOUT = {"program": "eval_lm.py", "temperature": 2.0, "weight": 0.25}


def saved(
    path: Path, seed: int = 0, *, text_sums: bool = False, about: dict | None = None, **fingerprint: object
) -> Retrieval:
    """A file of made-up tokens; the first finds nothing, none of the second's neighbours holds its target."""
    rng = np.random.default_rng(seed)
    target = torch.from_numpy(rng.integers(1, TYPES, N))
    values, keep = torch.from_numpy(rng.integers(1, TYPES, (N, K))), torch.ones(N, K, dtype=torch.bool)
    values[1], target[1], keep[0] = 0, 1, False
    keep[5, 3:] = False
    scores = torch.from_numpy(-20 * rng.random((N, K), np.float32)).masked_fill(~keep, -torch.inf)
    sums = LogSums(*torch.from_numpy(-3 * rng.random((2, N), np.float32))) if text_sums else None
    found = Candidates(values, scores, keep, torch.arange(N * K).view(N, K).masked_fill(~keep, -1))
    words = {
        "num_types": TYPES,
        "num_rows": N * K,
        "text_sums": text_sums,
        "fingerprint": KNN | fingerprint,
        "about": about or ABOUT,
    }
    with RetrievalWriter(path, N, K, **words) as writer:
        lm = (-9 * torch.from_numpy(rng.random(N, np.float32)), torch.from_numpy(rng.random(N, np.float32)))
        writer.append(torch.arange(N).flip(0) // 7, target, rng.random(N) < 0.2, *lm, sums, found)
        writer.finish()
    return Retrieval.open(path)


def by_hand(retrieval: Retrieval, setting: Setting) -> np.ndarray:
    """ln p of each token by the paper's formula, in float64, token by token."""
    arrays, out = retrieval.arrays, []
    for row in range(N):
        scores = arrays["scores"][row, : setting.k].astype(np.float64) / setting.temperature
        weights = np.exp(scores)
        hit = weights[arrays["values"][row, : setting.k] == arrays["target"][row]].sum()
        p_knn = hit / weights.sum() if weights.sum() else 0.0
        p = (1 - setting.weight) * np.exp(np.float64(arrays["lm_logp"][row])) + setting.weight * p_knn
        out.append(math.log(p) if p else -math.inf)
    return np.array(out)


def test_a_sweep_of_knn_lm_is_the_formula(tmp_path):
    retrieval = saved(tmp_path / "r")
    grid = Grid((1, 5, K), (0.0, 0.3, 0.95, 1.0), (1.0, 4.0))
    results = sweep([retrieval], grid)
    assert len(results) == len(grid.settings) == 24
    order, continues = retrieval.order, retrieval.arrays["continues"]
    for result in results:
        expected = by_hand(retrieval, result.setting)
        sums = loss_sums(retrieval.arrays["block"][order], continues[order], expected[order])
        assert result.sums.loss_base2 == pytest.approx(sums.loss_base2, abs=1e-6)
        assert dataclasses.replace(result.sums, nats=0) == dataclasses.replace(sums, nats=0)
    impossible = {r.setting: r.sums.num_impossible for r in results}
    assert impossible[Setting(K, 1.0, 1.0)] >= 2
    assert impossible[Setting(K, 0.3, 1.0)] == 0
    alone = language_model_alone([retrieval])
    assert alone == next(r.sums for r in results if r.setting.weight == 0)


@pytest.mark.parametrize("text_sums", [False, True])
@pytest.mark.parametrize("mode", ["gn", "li"])
def test_a_sweep_of_trime_is_separate_evaluations(tmp_path, text_sums, mode):
    about = ABOUT | {"program": "eval_lm-trime.py", "mode": mode, "interp_temp": 3.0}
    fixed = {"softmax_temp": 2.0} if text_sums else {}
    retrieval = saved(tmp_path / "r", text_sums=text_sums, about=about, joint=True, **fixed)
    joint = (2.0,) if text_sums else (1.0, 2.0)
    grid = Grid((3, K), (0.0, 0.4), (3.0, 9.0), joint)
    part, order = retrieval.part(slice(0, N)), retrieval.order
    blocks, continues = (retrieval.arrays[name][order] for name in ("block", "continues"))
    results = {result.setting: result.sums.loss_base2 for result in sweep([retrieval], grid)}
    for k, t, temp, weight in itertools.product((3, K), joint, (3.0, 9.0), (0.0, 0.4)):
        combine = JointNormalization(DIM, t, mode != "li", weight, temp)
        found = Candidates(*(x[:, :k] for x in (part.found.values_NM, part.found.scores_NM, part.found.keep_NM)))
        logp = combine(part.lm_logp_N, part.lm_norm_N, found, part.target_N, part.text_sums).double().numpy()
        expected = loss_sums(blocks, continues, logp[order]).loss_base2
        assert results[Setting(k, weight, temp, t)] == pytest.approx(expected, abs=1e-6)
    assert len(results) == len(grid.settings)


def test_shards_add_up_and_must_be_complete(tmp_path):
    paths = [str(tmp_path / f"r{shard}") for shard in range(2)]
    shards = [saved(Path(path), seed, shard=[seed, 2]) for seed, path in enumerate(paths)]
    grid = Grid((K,), (0.3,), (1.0,))
    (both,) = sweep(shards, grid)
    one, other = (sweep([shard], grid)[0].sums for shard in shards)
    assert both.sums == one.plus(other)
    assert both.sums.num_tokens == 2 * N
    assert [r.path for r in open_all(paths)] == [Path(path) for path in paths]
    with pytest.raises(ValueError, match="the files hold the shards 0 of 2 .* name all shards"):
        open_all(paths[:1])
    with pytest.raises(ValueError, match="r0 holds the same part of the text as another"):
        open_all([paths[0], paths[0]])
    saved(tmp_path / "x", 1, shard=[1, 2], model_digest="other")
    with pytest.raises(ValueError, match='are of different evaluations: model_digest "m" and "other"'):
        open_all([paths[0], str(tmp_path / "x")])


def test_the_best_never_leaves_tokens_out():
    results = [Result(Setting(1, w, 1.0), sums) for w, sums in enumerate((LossSums(9, 5, 5, 0), LossSums(1, 5, 3, 2)))]
    assert best_of(results) is results[0]


def test_the_best_setting_on_another_split(tmp_path):
    tuned, other = saved(tmp_path / "r"), saved(tmp_path / "other", 3)
    best = best_of(sweep([tuned], Grid((K,), (0.2, 0.5), (1.0, 4.0))))
    expected = by_hand(other, best.setting)
    order = other.order
    sums = loss_sums(other.arrays["block"][order], other.arrays["continues"][order], expected[order])
    assert at(best, [other]).sums.loss_base2 == pytest.approx(sums.loss_base2, abs=1e-6)
    best = dataclasses.replace(best, setting=Setting(K + 1, 0.2, 1.0))
    with pytest.raises(ValueError, match=f"the best setting has --k {K + 1}, and .*other holds {K} neighbours"):
        at(best, [other])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.25", (0.25,)),
        ("3,1,10", (1.0, 3.0, 10.0)),
        ("0:0.9:0.05", tuple(i / 100 for i in range(0, 91, 5))),
        ("0:1:0.3, 0.95", (0.0, 0.3, 0.6, 0.9, 0.95)),
        ("0.1,0.1", (0.1,)),
        ("1e-1:0.2:0.1", (0.1, 0.2)),
    ],
)
def test_number_grids(text, expected):
    assert number_grid(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "is no number or range; write 0.25, a list")
            for text in ("", "1,", "a", "0:1", "0:1:0.1:2", "nan", "inf")
        ),
        *((text, "is an empty range") for text in ("0:1:0", "1:0:0.1", "0:1:-0.1")),
        ("0:1:0.0000001", "makes more than 10000 numbers"),
    ],
)
def test_malformed_number_grids(text, message):
    with pytest.raises(UnreadableError, match=message):
        number_grid(text)


def test_count_grids():
    assert count_grid("8,64,1024") == (8, 64, 1024)
    assert count_grid("8:32:8") == (8, 16, 24, 32)
    with pytest.raises(UnreadableError, match="holds 2.5; give whole numbers"):
        count_grid("1,2.5")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retrievals": ()}, "name the file"),
        ({"lmbda": (0.5, 1.5)}, r"--lmbda 1.5 is not in \[0, 1\]"),
        ({"lmbda": (-0.1,)}, r"--lmbda -0.1 is not in \[0, 1\]"),
        ({"temperature": (0.0, 1.0)}, "--temperature 0 is not positive"),
        ({"interp_temp": (-2.0,)}, "--interp-temp -2 is not positive"),
        ({"k": (0, 3)}, "--k must be at least 1, got 0"),
        ({"explain": -1}, "--explain must be at least 0, got -1"),
    ],
)
def test_impossible_settings(given, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**({"retrievals": ("r",)} | given))


def test_what_the_saved_neighbours_cannot_tell(tmp_path):
    knn = saved(tmp_path / "knn")
    words = {"retrievals": ("r",)}
    assert Grid.of(SweepConfig(**words), knn) == Grid((K,), number_grid("0:0.9:0.05"), (2.0,))
    with pytest.raises(ValueError, match=f"--k 99 is more than the {K} neighbours per token in .*save them again"):
        Grid.of(SweepConfig(**words, k=(8, 99)), knn)
    with pytest.raises(ValueError, match="--interp-temp is TRIME's"):
        Grid.of(SweepConfig(**words, interp_temp=(1.0,)), knn)
    about = ABOUT | {"mode": "gn", "interp_temp": 3.0}
    trime = saved(tmp_path / "trime", text_sums=True, about=about, joint=True, softmax_temp=2.0)
    assert Grid.of(SweepConfig(**words, temperature=(2.0,)), trime).joint_temperatures == (2.0,)
    with pytest.raises(
        ValueError, match="--temperature 1, 2: the sums of the text's own memories .* at --softmax-temp 2"
    ):
        Grid.of(SweepConfig(**words, temperature=(1.0, 2.0)), trime)


def test_equally_close_rows_come_in_their_order():
    ids = torch.tensor([[7, 9, 3, 2, 5], [4, 1, 8, -1, -1], [1, 2, 3, 4, 5]])
    inf = torch.inf
    scores = torch.tensor([[0.0, -1, -1, -1, -2], [-1, -1, -2, -inf, -inf], [0, -1, -2, -3, -4]])
    found = by_row_where_equal(Neighbors(ids, scores))
    assert found.ids_NK.tolist() == [[7, 2, 3, 9, 5], [1, 4, 8, -1, -1], [1, 2, 3, 4, 5]]
    assert torch.equal(found.scores_NK, scores)
    distinct = Neighbors(ids[2:], scores[2:])
    assert by_row_where_equal(distinct) is distinct
