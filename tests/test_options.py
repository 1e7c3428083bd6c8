"""The published commands are read as they are printed; other flags are errors that help."""

from __future__ import annotations

import logging
import shlex

import pytest

from fairseq.data.batching_config import DatasetConfig
from fairseq.evaluation.config import EvaluationConfig, MemoryEvaluationConfig
from fairseq.memory.sources.config import KnnConfig
from fairseq.optim import LR_SCHEDULERS
from fairseq.optim.configs import OptimizationConfig
from fairseq.options import parse_eval_lm, parse_train
from fairseq.runtime.config import RuntimeConfig

KNNLM_TRAIN = """--task language_modeling data-bin/wikitext-103 --save-dir checkpoints/ --arch transformer_lm_wiki103
 --max-update 286000 --max-lr 1.0 --t-mult 2 --lr-period-updates 270000 --lr-scheduler cosine --lr-shrink 0.75
 --warmup-updates 16000 --warmup-init-lr 1e-07 --min-lr 1e-09 --optimizer nag --lr 0.0001 --clip-norm 0.1
 --criterion adaptive_loss --max-tokens 3072 --update-freq 3 --tokens-per-sample 3072 --seed 1 --fp16
 --sample-break-mode none --skip-invalid-size-inputs-valid-test --ddp-backend=no_c10d"""

KNNLM_EVAL = """data-bin/wikitext-103 --path checkpoints/checkpoint_best.pt --sample-break-mode complete
 --max-tokens 3072 --context-window 2560 --softmax-batch 1024 --gen-subset valid --dstore-filename checkpoints/dstore
 --indexfile checkpoints/knn.index --model-overrides "{'knn_keytype': 'last_ffn_input'}" --k 1024 --lmbda 0.25
 --dstore-size 103225485 --knn-keytype last_ffn_input --probe 32 --knnlm --fp16"""

TRIME_SAVE = """data-bin/wikitext-103 --path m/checkpoint_best.pt --sample-break-mode none --max-tokens 3072
 --softmax-batch 1024 --gen-subset train --context-window 2560 --tokens-per-sample 512 --dstore-mmap m/dstore
 --knn-keytype last_ffn_input --dstore-size 103224461 --save-knnlm-dstore --fp16 --dstore-fp16"""


def test_the_published_training_command(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settings = parse_train(shlex.split(KNNLM_TRAIN))
    assert settings.chosen["arch"] == "transformer_lm_wiki103"
    schedule = settings.config(LR_SCHEDULERS["cosine"].config)
    assert (schedule.max_lr, schedule.t_mult, schedule.lr_shrink) == (1.0, 2, 0.75)
    assert settings.config(OptimizationConfig).update_freq_in(7) == 3
    assert settings.config(DatasetConfig).max_tokens == 3072
    assert settings.config(RuntimeConfig).fp16
    assert not caplog.records


def test_the_published_evaluation_commands() -> None:
    settings = parse_eval_lm(shlex.split(KNNLM_EVAL))
    assert settings.config(EvaluationConfig).model_overrides == {"knn_keytype": "last_ffn_input"}
    knn = settings.config(KnnConfig)
    assert (knn.num_neighbors, knn.weight, knn.probe, knn.similarity) == (1024, 0.25, 32, "recompute")
    saving = parse_eval_lm(shlex.split(TRIME_SAVE))
    assert saving.config(MemoryEvaluationConfig).save_knnlm_dstore
    assert saving.config(KnnConfig).dstore_fp16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arch", "transformer_lm_wiki104"], "did you mean 'transformer_lm_wiki103'?"),
        (["--optimizer", "adamm"], "did you mean 'adam'?"),
        (["--lr-schedular", "cosine"], "did you mean '--lr-scheduler'?"),
        (["--optimizer", "nag", "--adam-betas", "(0.9,0.98)"], "--adam-betas belongs to --optimizer adam, not to nag"),
    ],
)
def test_a_wrong_choice_or_flag_is_told_with_the_nearest(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse_train(["data-bin", *words])
    assert told in capsys.readouterr().err + str(stopped.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--path"),
        (["--path", "x", "--knnlm", "--save-knnlm-dstore", "--dstore-mmap", "y"], "exclude each other"),
        (["--path", "x", "--save-knnlm-dstore"], "--dstore-mmap"),
        (["--path", "x", "--num-shards", "2", "--shard-id", "2"], "--shard-id 2 is not in 0..1"),
        (["--path", "x", "--fp16", "--bf16"], "exclude each other"),
        (["--path", "x", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    ],
)
def test_impossible_evaluations_are_told(words: list[str], told: str) -> None:
    settings = parse_eval_lm(["data-bin", *words])
    messages = []
    for config_class in (EvaluationConfig, MemoryEvaluationConfig, RuntimeConfig, DatasetConfig):
        try:
            settings.config(config_class)
        except ValueError as error:
            messages.append(str(error))
    assert [told in message for message in messages] == [True]


def test_training_that_would_never_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="never stop"):
        parse_train(["data-bin", "--max-tokens", "100"]).config(OptimizationConfig)
