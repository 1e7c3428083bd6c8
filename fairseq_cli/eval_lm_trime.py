"""Score text with a language model and TRIME's memories: local, long-term and external."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq.evaluation.memories import check_trime
from fairseq.evaluation.outputs import begin_manifest, print_report, write_outputs
from fairseq.memory.index.sharded.early import begin_search
from fairseq.options import evaluation_configs, parse_eval_lm
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Evaluate with the memories that are named."""
    configs = evaluation_configs(parse_eval_lm(argv, "eval_lm-trime.py"))
    check_trime(configs)
    if configs.trime is not None and configs.trime.use_external:
        begin_search(configs.knn.search_on)
    begin_manifest(configs)

    from fairseq.evaluation.run import run_evaluation

    evaluation, report, figures = run_evaluation(configs)
    print_report(figures, buckets=True, positions=configs.evaluation.output_position_stats)
    write_outputs(configs, evaluation, report, figures)


def cli_main() -> None:
    """Entry point of eval_lm-trime.py."""
    run("eval_lm-trime.py", main)


if __name__ == "__main__":
    cli_main()
