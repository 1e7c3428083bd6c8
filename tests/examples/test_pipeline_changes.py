"""What examples/pipeline's stages made is not taken for the result of other models, rows or files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("rouge_score")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_pipeline import FOLDER, configured, pairs, words_for, write_jsonl, write_material  # noqa: E402

from fairseq.hf.pipeline import evaluation, saving, training  # noqa: E402
from fairseq.hf.pipeline.config import PipelineConfig  # noqa: E402
from fairseq.memory.datastore.delete import delete  # noqa: E402


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs, models and a short finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_material(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(FOLDER))
        import generate

        for stage in (generate.generate, training.train, saving.save_store, evaluation.evaluate_pairs):
            assert not stage(config_of()).was_complete
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(*words: str) -> PipelineConfig:
    settings = ["training.num_epochs=1", "evaluation.metrics=[]", "evaluation.max_examples=4", *words]
    return configured([*words_for(Path(), Path("run")), *settings])


def evaluated(*words: str) -> evaluation.Evaluated:
    done = evaluation.evaluate_pairs(config_of(*words))
    assert done is not None
    return done


def checkpoint_in(folder: Path) -> Path:
    return max((folder / "run" / "model").glob("step-*"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_rows_deleted_from_the_datastore_change_the_figures(finished: Path) -> None:
    before = evaluated()
    assert before.was_complete
    delete("run/store/store", np.arange(0, 235, 2))
    after = evaluated()
    assert not after.was_complete
    assert after.figures["model"] == before.figures["model"]
    assert after.figures["knn"]["perplexity"] != before.figures["knn"]["perplexity"]


def test_another_generation_config_is_evaluated_anew(finished: Path) -> None:
    words = ["evaluation.metrics=[exact_match]", "model.enable_knn=false"]
    assert not evaluated(*words).was_complete
    change(checkpoint_in(finished) / "generation_config.json", repetition_penalty=9.0)
    assert not evaluated(*words).was_complete
    assert evaluated(*words).was_complete


def test_another_config_of_the_checkpoint_is_another_model(finished: Path) -> None:
    change(checkpoint_in(finished) / "config.json", layer_norm_epsilon=0.1)
    assert not evaluated("model.enable_knn=false").was_complete
    with pytest.raises(
        ValueError, match=r"was saved with another config\.json of the model \(digest [0-9a-f]+\) than "
    ):
        evaluated()
    with pytest.raises(ValueError, match="has model_config '[0-9a-f]+', that of this command is '[0-9a-f]+'"):
        saving.save_store(config_of())


def test_another_base_model_of_the_same_name_is_another_run(finished: Path) -> None:
    done = training.train(config_of())
    assert done is not None
    assert done.was_complete
    weights = load_file("t5/model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, "t5/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds a run with weights of model.name '[0-9a-f]+', now it is '[0-9a-f]+'"):
        training.train(config_of())


def test_another_config_of_the_base_model_is_another_run(finished: Path) -> None:
    change(finished / "t5" / "config.json", dropout_rate=0.2)
    with pytest.raises(ValueError, match="holds a run with config of model.name '[0-9a-f]+', now it is"):
        training.train(config_of())


def test_the_loss_is_of_the_validation_pairs_at_hand(finished: Path) -> None:
    write_jsonl(finished / "other.jsonl", pairs(9, 5))
    words = ["data.val_path=other.jsonl"]
    sys.modules["generate"].generate(config_of(*words))
    with pytest.raises(ValueError, match="holds a run with validation data '[0-9a-f]+', now it is '[0-9a-f]+'"):
        training.train(config_of(*words))
    done = training.train(config_of(*words, "training.eval_iters=0"))
    assert done is not None
    assert done.was_complete, "which needs no validation pairs"


def test_an_encoder_is_not_trained_saved_from_or_evaluated_as_a_decoder(finished: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    shutil.copytree("gpt2", "bert")
    config = transformers.BertConfig(vocab_size=27, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained("bert")
    words = ["model.name=bert", "folder=other"]
    sys.modules["generate"].generate(config_of(*words))
    for stage in (training.train, saving.save_store, evaluation.evaluate_pairs):
        with pytest.raises(ValueError, match=r"^bert \(BertLMHeadModel\) reads the tokens that it is to predict"):
            stage(config_of(*words, "model.checkpoint=bert", "model.enable_knn=false"))
    assert not Path("other/model").exists()


def test_examples_that_are_gone_are_written_again_and_changed_ones_kept(finished: Path) -> None:
    path = finished / "run" / "evaluation" / "examples.jsonl"
    before = path.read_text()
    path.unlink()
    assert not evaluated().was_complete
    assert path.read_text() == before
    path.write_text(before + "a note\n")
    with pytest.raises(
        ValueError, match=r"run/evaluation/examples\.jsonl is not what .*results\.json was computed from"
    ):
        evaluated()
    assert path.read_text() == before + "a note\n"
