"""Score text with a language model: plain, with a datastore (kNN-LM, RetoMaton), or to save a datastore."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from fairseq.evaluation.config import EvaluationConfigs, MemoryEvaluationConfig
from fairseq.evaluation.memories import check_knn
from fairseq.evaluation.outputs import begin_manifest, print_report, write_outputs
from fairseq.memory.index.sharded.early import begin_search
from fairseq.options import Settings, evaluation_configs, parse_eval_lm
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Evaluate, or save a datastore."""
    settings = parse_eval_lm(argv)
    if settings.config(MemoryEvaluationConfig).save_knnlm_dstore:
        settings = as_shard_of_torchrun(settings)
    configs = evaluation_configs(settings)
    check_knn(configs)
    if configs.memory.save_knnlm_dstore:
        save_datastore(configs)
        return
    if configs.memory.knnlm:
        begin_search(configs.knn.search_on)
    begin_manifest(configs)

    from fairseq.evaluation.run import run_evaluation

    evaluation, report, figures = run_evaluation(configs)
    print_report(figures, positions=configs.evaluation.output_position_stats)
    write_outputs(configs, evaluation, report, figures)


def save_datastore(configs: EvaluationConfigs) -> None:
    """Write the keys and next tokens of a split as a datastore."""
    from fairseq.evaluation.memories import open_reader
    from fairseq.evaluation.run import set_determinism
    from fairseq.evaluation.save_datastore import check_place, save_and_report
    from fairseq.evaluation.setup import open_evaluation

    set_determinism(configs.runtime)
    facts = check_place(configs)
    evaluation = open_evaluation(configs, in_order=True)
    scorer, _ = open_reader(configs, evaluation)
    save_and_report(configs, evaluation, scorer, facts)


def as_shard_of_torchrun(settings: Settings) -> Settings:
    """Each process that torchrun starts saves the shard of its rank, on its own device."""
    count, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if "TORCHELASTIC_RUN_ID" not in os.environ or count == 1:
        return settings
    if {"num_shards", "shard_id"} & settings.given.keys():
        raise ValueError(f"torchrun makes a shard of each of its {count} processes; leave out --num-shards, --shard-id")
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return dataclasses.replace(settings, given=dict(settings.given) | {"num_shards": count, "shard_id": rank})


def cli_main() -> None:
    """Entry point of eval_lm.py and fairseq-eval-lm."""
    run("eval_lm.py", main)


if __name__ == "__main__":
    cli_main()
