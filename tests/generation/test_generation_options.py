"""Options of generation, of its memory and of combiners: what no computation can use is named before any begins."""

import math

import pytest

from fairseq.config import FlagParser, build, field_help
from fairseq.generation.config import GenerateConfig, GenerationConfig, StepKnnConfig, StepMemoryConfig
from fairseq.generation.foreign_overrides import split_overrides
from fairseq.memory.combiners.config import CombinerTrainingConfig
from fairseq.tasks.configs import overridden_limits

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lenpen": NAN}, "--lenpen must be at least -10.0, got nan; 1 is the mean over the tokens, 0 the sum"),
        ({"lenpen": INF}, "--lenpen must be at most 10.0, got inf"),
        ({"lenpen": 300.0}, "--lenpen must be at most 10.0, got 300.0"),
        ({"unkpen": NAN}, "--unkpen must be at least -1000000000.0, got nan"),
        ({"unkpen": INF}, "--unkpen must be at most 1000000000.0, got inf; 1e9 keeps <unk> out of every text"),
        ({"max_len_a": 1e300}, "--max-len-a must be at most 2147483647, got 1e[+]300"),
        ({"max_len_a": NAN}, "--max-len-a must be at least 0, got nan"),
        ({"max_len_b": 10**30}, "--max-len-b must be at most 2147483647"),
        ({"min_len": 10**30}, "--min-len must be at most 2147483647"),
        ({"beam": "5"}, "--beam must be at least 1, got 5"),
        ({"logit_temperature": NAN}, "--temperature must be at least 1e-06, got nan"),
        ({"logit_temperature": 1e-300}, "--temperature must be at least 1e-06, got 1e-300"),
        ({"logit_temperature": INF}, "--temperature must be at most 1000000.0, got inf"),
        ({"sampling": True, "sampling_topp": NAN}, "--sampling-topp nan is no share of the probability; .* -1 to draw"),
        ({"sampling": True, "sampling_topp": 0.0}, "--sampling-topp 0.0 is no share"),
        ({"sampling": True, "sampling_topp": 1.5}, "--sampling-topp 1.5 is no share"),
        ({"sampling": True, "sampling_topk": 0}, "--sampling-topk must be at least 1, got 0; -1 draws from all types"),
        ({"sampling": True, "sampling_topk": -5}, "--sampling-topk must be at least 1, got -5"),
        ({"sampling_topk": 3}, "--sampling-topk 3 belongs to --sampling"),
    ],
)
def test_numbers_that_no_search_can_use(given, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**given)


def test_numbers_at_their_limits_are_accepted():
    GenerationConfig(lenpen=-10.0, unkpen=1e9, max_len_a=1e9, max_len_b=2**31 - 1, logit_temperature=1e-6)
    GenerationConfig(sampling=True, sampling_topk=-1, sampling_topp=1.0)
    assert GenerationConfig().sampling_topp == -1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": INF}, "--lr inf is not above 0 and at most 100; 3e-4 is the default"),
        ({"rate": NAN}, "--lr nan is not above 0"),
        ({"dropout": NAN}, r"--combiner-dropout nan is not in \[0, 1\)"),
        ({"held_out": NAN}, "--held-out nan is not between 0 and 1"),
        ({"hidden": 10**30}, "--hidden-size must be at most 2147483647"),
    ],
)
def test_numbers_that_no_training_can_use(given, message):
    with pytest.raises(ValueError, match=message):
        CombinerTrainingConfig(**given)


def test_generation_names_the_temperature_and_the_model_by_its_own_words():
    parser = FlagParser("generate.py", "")
    parser.add_config(StepKnnConfig)
    assert build(StepKnnConfig, parser.parse(["--softmax-temp", "3"])).temperature == 3.0
    assert build(StepKnnConfig, {}).num_neighbors == 8
    assert field_help(StepKnnConfig)["weight"].endswith("0 is the model alone.")
    assert "language model" not in " ".join(field_help(StepKnnConfig).values())
    for words in (["--softmax-temp", "nan"], ["--knn-temp", "nan"]):
        with pytest.raises(ValueError, match="--knn-temp must be at least 1e-06, got nan; 1 changes nothing"):
            build(StepKnnConfig, parser.parse(words))


def test_overrides_are_whole_numbers_and_limits():
    with pytest.raises(ValueError, match="--model-overrides: k inf is not a whole number"):
        split_overrides({"use_knn_datastore": True, "k": INF})
    with pytest.raises(ValueError, match="knn_temperature_value nan is not a number"):
        split_overrides({"use_knn_datastore": True, "knn_temperature_value": NAN})
    assert overridden_limits({"max_source_positions": 7, "dropout": 0.1}) == {"max_source_positions": 7}
    for value in (0, "9", True, 2.5):
        with pytest.raises(ValueError, match="--model-overrides: max_source_positions .* is not a positive integer"):
            overridden_limits({"max_source_positions": value})


def test_each_shard_has_files_of_its_own():
    assert GenerateConfig(path="x").results_name == "generate-test"
    names = {GenerateConfig(path="x", num_shards=4, shard_id=shard).results_name for shard in range(4)}
    assert names == {f"generate-test.shard{shard}of4" for shard in range(4)}


@pytest.mark.parametrize(
    ("given", "words"),
    [({"nbest": 2}, "--nbest 2"), ({"prefix_size": 3}, "--prefix-size 3"), ({"sampling": True}, "--sampling")],
)
def test_references_are_not_scored_as_generated_texts(given, words):
    generation = GenerationConfig(**given)
    GenerateConfig(path="x").check_reference(generation, StepMemoryConfig())
    with pytest.raises(ValueError, match=f"--score-reference scores the one reference of each sentence, {words} is"):
        GenerateConfig(path="x", score_reference=True).check_reference(generation, StepMemoryConfig())
