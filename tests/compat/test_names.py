"""What public plug-ins of fairseq import exists here, or says in one sentence what to use instead."""

import importlib
import subprocess
import sys

import pytest

from fairseq.fairseq_names import ELSEWHERE, MODULES, NAMES

# kind of plug-in -> module -> names it imports
PLUGINS = {
    "kNN-LM": {
        "fairseq": "checkpoint_utils options progress_bar tasks utils",
        "fairseq.meters": "StopwatchMeter TimeMeter",
        "fairseq.sequence_scorer": "SequenceScorer",
        "fairseq.knnlm": "KNN_Dstore",
        "fairseq.data": "LMContextWindowDataset Dictionary",
        "fairseq.checkpoint_utils": "load_model_ensemble load_model_ensemble_and_task load_checkpoint_to_cpu",
        "fairseq.options": "get_eval_lm_parser parse_args_and_arch",
        "fairseq.utils": "import_user_module move_to_cuda item",
    },
    "TRIME": {
        "fairseq": "distributed_utils metrics",
        "fairseq.criterions": "FairseqCriterion register_criterion",
        "fairseq.data": "MonolingualDataset TokenBlockDataset iterators data_utils",
        "fairseq.data.data_utils": "batch_by_size numpy_seed filter_by_size load_indexed_dataset collate_tokens",
        "fairseq.distributed_utils": "get_rank get_world_size is_master all_reduce",
        "fairseq.options": "get_training_parser",
        "fairseq.tasks": "setup_task",
        "fairseq.trainer": "Trainer",
        "fairseq.modules": "AdaptiveSoftmax AdaptiveInput",
    },
    "adaptive span": {
        "fairseq.models.fairseq_model": "FairseqLanguageModel",
        "fairseq.modules": "LayerNorm MultiheadAttention FairseqDropout",
        "fairseq.utils": "get_activation_fn softmax log_softmax fill_with_neg_inf buffered_arange",
        "fairseq.dataclass": "FairseqDataclass",
        "fairseq.tasks": "FairseqTask",
        "fairseq.models": "FairseqIncrementalDecoder register_model FairseqLanguageModel BaseFairseqModel",
    },
    "label smoothing": {
        "fairseq.logging": "metrics meters progress_bar",
        "fairseq.logging.metrics": "log_scalar log_derived aggregate get_smoothed_values reset_meters",
        "fairseq.logging.meters": "AverageMeter MetersDict safe_round SumMeter",
        "fairseq.criterions": "LegacyFairseqCriterion",
        "fairseq.criterions.fairseq_criterion": "FairseqCriterion",
        "fairseq.criterions.label_smoothed_cross_entropy": "label_smoothed_nll_loss",
        "fairseq.utils": "get_perplexity strip_pad",
        "fairseq.dataclass": "ChoiceEnum",
    },
    "task": {
        "fairseq.tasks": "LegacyFairseqTask register_task",
        "fairseq.tasks.fairseq_task": "FairseqTask",
        "fairseq.tasks.language_modeling": "LanguageModelingTask",
        "fairseq.data": "FairseqDataset BaseWrapperDataset LanguagePairDataset EpochBatchIterator",
        "fairseq.data.fairseq_dataset": "FairseqDataset",
        "fairseq.data.data_utils": "infer_language_pair lengths_to_padding_mask post_process",
        "fairseq.data.indexed_dataset": "MMapIndexedDataset MMapIndexedDatasetBuilder",
        "fairseq.sequence_generator": "SequenceGenerator",
        "fairseq.tokenizer": "tokenize_line",
        "fairseq.file_io": "PathManager",
        "fairseq.search": "BeamSearch",
    },
    "optimizer and schedule": {
        "fairseq.optim": "FairseqOptimizer LegacyFairseqOptimizer register_optimizer FP16Optimizer",
        "fairseq.optim.fairseq_optimizer": "FairseqOptimizer",
        "fairseq.optim.adafactor": "Adafactor",
        "fairseq.optim.lr_scheduler": "FairseqLRScheduler LegacyFairseqLRScheduler register_lr_scheduler",
        "fairseq.utils": "clip_grad_norm_ eval_str_list",
    },
    "architecture": {
        "fairseq.models": "register_model_architecture ARCH_MODEL_REGISTRY FairseqEncoderDecoderModel",
        "fairseq.models.transformer_lm": "TransformerLanguageModel base_lm_architecture transformer_lm_big "
        "transformer_lm_gpt transformer_lm_baevski_wiki103",
        "fairseq.models.transformer": "TransformerDecoder",
        "fairseq": "hub_utils",
        "fairseq.hub_utils": "GeneratorHubInterface from_pretrained",
        "fairseq.utils": "move_to_cpu make_positions eval_bool",
    },
}
WANTED = sorted({(m, name) for lists in PLUGINS.values() for m, names in lists.items() for name in names.split()})


def imported(module: str, name: str) -> str:
    """An empty string, or what the import's error says."""
    try:
        found = __import__(module, fromlist=[name])  # as "from module import name" does
    except ImportError as error:
        return str(error)
    assert hasattr(found, name), (module, name)
    return ""


ANSWERS = {wanted: imported(*wanted) for wanted in WANTED}


def test_at_least_seventy_of_a_hundred_wanted_names_exist():
    existing = [wanted for wanted, answer in ANSWERS.items() if not answer]
    assert len(WANTED) >= 100
    assert len(existing) >= 0.7 * len(WANTED)
    assert (len(existing), len(WANTED)) == (107, 118)  # docs/compatibility.md states it


@pytest.mark.parametrize("wanted", [wanted for wanted, answer in ANSWERS.items() if answer], ids=".".join)
def test_the_others_say_what_to_use_instead(wanted):
    answer = ANSWERS[wanted]
    assert answer.startswith("fairseq."), answer
    assert "\n" not in answer
    assert " is not offered: " in answer or " has another signature here: " in answer


@pytest.mark.parametrize("package", NAMES)
def test_every_name_of_the_table_is_served_and_listed(package):
    module = importlib.import_module(package)
    assert [name for name in NAMES[package] if not hasattr(module, name)] == []
    assert set(NAMES[package]) <= set(dir(module)) | set(NAMES[package])


@pytest.mark.parametrize("alias", MODULES)
def test_every_module_of_the_table_is_served(alias):
    assert importlib.import_module(alias).__name__ == alias


def test_an_unknown_name_is_an_attribute_error():
    from fairseq import data, models, utils

    for module in (data, utils):
        assert not hasattr(module, "nothing_of_the_kind")
    with pytest.raises(AttributeError, match="is not offered: derive from fairseq.models.transformer"):
        _ = models.FairseqEncoder
    assert all(text.startswith(("is not offered: ", "has another signature here: ")) for text in ELSEWHERE.values())


def test_importing_the_names_table_costs_nothing_heavy():
    code = "import sys, fairseq.data, fairseq.models, fairseq.tasks; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
