"""Evaluate many settings of a memory from one search: fairseq-knn-sweep FILE ... (see --save-retrieval)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.retrieval.sweep_config import SweepConfig
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.retrieval.explain import Change
    from fairseq.memory.retrieval.file import Retrieval
    from fairseq.memory.retrieval.sweep import Result

PROGRAM = "fairseq-knn-sweep"
logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Evaluate the grid, print the best setting and what it is worth, and leave the results in files."""
    parser = FlagParser(PROGRAM, SweepConfig.__doc__ or "")
    parser.add_config(SweepConfig)
    config = build(SweepConfig, parser.parse(argv))

    from fairseq.memory.retrieval.sweep import Grid, at, best_of, language_model_alone, open_all, require_alike, sweep
    from fairseq.memory.retrieval.sweep_outputs import write_outputs
    from fairseq.runtime.atomic_files import require_writable

    out = config.out or f"{config.retrievals[0]}.sweep"
    require_writable(os.path.dirname(os.path.abspath(out)), "--out")
    tuned = open_all(config.retrievals)
    grid = Grid.of(config, tuned[0])
    report = [name for part in config.report for name in part.split(",")]
    reported = open_all(report) if report else []
    for retrieval in reported[:1]:
        require_alike(tuned[0], retrieval)
    texts = _texts(config, (reported or tuned)[0]) if config.explain else None
    results = sweep(tuned, grid)
    best = best_of(results)
    final = at(best, reported) if reported else None
    subset = tuned[0].fingerprint["subset"]
    alone = language_model_alone(tuned)
    sys.stdout.write(
        f"{len(results)} settings on {subset} ({alone.num_tokens} tokens of {', '.join(config.retrievals)})\n"
    )
    sys.stdout.write(f"language model alone on {subset}: perplexity {alone.perplexity:.2f}\n")
    sys.stdout.write(f"best, tuned on {subset}: {best.setting.flags()} (perplexity {best.sums.perplexity:.2f})\n")
    figures: dict[str, Any] = {"tuned_on": subset, "files": list(config.retrievals), "best": best.to_dict()}
    figures |= {"language_model_alone": {"loss_base2": alone.loss_base2, "perplexity": alone.perplexity}}
    figures |= _reported(tuned, reported, final)
    print_report(final or best)
    if texts:
        figures |= _explained(reported or tuned, best, config.explain, *texts)
    inputs = [*config.retrievals, *report]
    write_outputs(out, results, best, figures, argv=argv, config=to_dict(config), inputs=inputs)


def print_report(result: Result) -> None:
    """The line that scripts read."""
    sums = result.sums
    sys.stdout.write(f"Loss (base 2): {sums.loss_base2:.4f}, Perplexity: {sums.perplexity:.2f}\n")
    if sums.num_impossible:
        sys.stdout.write(f"{sums.num_impossible} tokens have probability 0 and are dropped\n")


def _reported(tuned: Sequence[Retrieval], reported: Sequence[Retrieval], final: Result | None) -> dict[str, Any]:
    """Note on the figure: the text on which it was tuned."""
    from fairseq.memory.retrieval.sweep import language_model_alone, same_text

    subset = tuned[0].fingerprint["subset"]
    if not reported or final is None:
        logger.warning(
            "this figure is taken on %s, the split the setting was chosen on, and flatters it: give --report the saved "
            "neighbours of another split",
            subset,
        )
        return {"reported_on": subset, "tuned_on_reported_text": True}
    split = reported[0].fingerprint["subset"]
    alone = language_model_alone(reported)
    sys.stdout.write(f"reported on {split} (language model alone: perplexity {alone.perplexity:.2f})\n")
    overlaps = same_text(tuned, reported)
    if overlaps:
        logger.warning("--report names the text that the setting was chosen on (%s), which flatters it", subset)
    return {"reported_on": split, "tuned_on_reported_text": overlaps, "reported": final.to_dict()} | {
        "reported_alone": {"loss_base2": alone.loss_base2, "perplexity": alone.perplexity}
    }


def _texts(config: SweepConfig, retrieval: Retrieval) -> tuple[Datastore, Dictionary]:
    """The datastore and the dictionary that neighbours and tokens are shown in; checked before the long part."""
    from fairseq.data.dictionary import Dictionary
    from fairseq.memory.retrieval.explain import open_store

    path = config.dictionary or retrieval.about["dictionary"]
    if not os.path.isfile(path):
        raise ValueError(f"--explain needs a dictionary and {path} does not exist; give --dictionary FILE")
    dictionary = Dictionary.load(path)
    if dictionary.digest() != retrieval.fingerprint["dictionary_digest"]:
        raise ValueError(
            f"dictionary {path} ({len(dictionary)} types) is not the one of {retrieval.path} "
            f"({retrieval.fingerprint['dictionary_size']} types); name that one by --dictionary"
        )
    return open_store(retrieval, config.dstore_filename), dictionary


def _explained(
    retrievals: Sequence[Retrieval], best: Result, count: int, store: Datastore, dictionary: Dictionary
) -> dict[str, Any]:
    """Print the tokens that changed most; returns them as plain types."""
    from fairseq.memory.retrieval.explain import explain

    gained, lost = explain(retrievals, best.setting, count, store, dictionary)
    for title, changes in (("gained most", gained), ("lost most", lost)):
        sys.stdout.write(f"\n{title}:\n")
        for number, change in enumerate(changes, 1):
            _show(number, change)
    return {"gained": [c.to_dict() for c in gained], "lost": [c.to_dict() for c in lost]}


def _show(number: int, change: Change) -> None:
    sys.stdout.write(
        f"{number:3}. {change.gain:+.2f} (ln p {change.logp_before:.2f} -> {change.logp_after:.2f}, by the neighbours "
        f"alone {change.memory_logp:.2f}): {change.text}\n"
    )
    for neighbor in change.neighbors:
        mark = "*" if neighbor.is_hit else " "
        sys.stdout.write(f"     {mark} {neighbor.share:.3f} row {neighbor.row}: {neighbor.text}\n")


def cli_main() -> None:
    """Entry point of fairseq-knn-sweep."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
