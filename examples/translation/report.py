"""The table and the plot of run.sh and domain.sh: python examples/translation/report.py [--domain] FOLDER...

With several folders, one per seed, it prints means with their spread, and how often each way is above the plain model.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.config import FlagParser, build, flag
from fairseq.metrics.bleu import Compared, paired_bootstrap
from fairseq.runtime.atomic_files import write_atomically


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of the report."""

    folders: tuple[str, ...] = flag("folders")
    """Folders that run.sh made, one per seed."""
    chosen: str | None = flag("--chosen", default=None)
    """Print only the values of these settings (k,share or temp) that were best on valid."""
    domain: bool = flag("--domain", default=False)
    """The folder is domain.sh's."""


SYSTEMS = {
    "plain": "model alone",
    "knn": "kNN-MT",
    "adaptive": "adaptive kNN-MT",
    "trime-alone": "TrimeMT's model, alone",
    "trime": "TrimeMT with its datastore",
}
SETTING = "beam 4, --lenpen 0.6, --max-len-a 1.2 --max-len-b 10; no sentence left out"


def figures(folder: Path, split: str) -> dict[str, Any]:
    """What one translation came to."""
    record = json.loads((folder / f"generate-{split}.run.json").read_text(encoding="utf-8"))
    return dict(record["figures"])


def swept(out: Path, settings: Sequence[str]) -> dict[tuple[str, ...], float]:
    """BLEU on valid by the values of some settings, which are named in the folders: knn-k8-share0.2.valid."""
    pattern = re.compile("[a-z]+-" + "-".join(f"{name}([0-9.]+)" for name in settings) + r"\.valid")
    folders = [(pattern.fullmatch(folder.name), folder) for folder in out.glob("*.valid")]
    return {match.groups(): figures(folder, "valid")["bleu"] for match, folder in folders if match}


def best(out: Path, settings: Sequence[str]) -> tuple[str, ...]:
    """The values that were best on valid. Raises: ValueError when nothing was tried."""
    found = swept(out, settings)
    if not found:
        raise ValueError(
            f"{out} holds no translation of valid by {', '.join(settings)}; run examples/translation/run.sh"
        )
    return max(found, key=lambda values: (found[values], values))


def texts(out: Path, name: str, kind: str = "hyp") -> list[str]:
    """The translations (or references) of the test sentences."""
    path = out / f"{name}.test" / f"generate-test.{kind}"
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def compared(out: Path, names: Sequence[str]) -> dict[str, Compared]:
    """Every system on test beside the plain model."""
    reference, plain = texts(out, "plain", "ref"), texts(out, "plain")
    return {name: paired_bootstrap(texts(out, name), plain, reference) for name in names}


def table(found: dict[str, Compared]) -> list[str]:
    """BLEU of every system, its difference to the plain model, and the bootstrap's p."""
    lines = ["| | BLEU | against the model alone | p |", "|---|---|---|---|"]
    for name, told in found.items():
        beside = ("", "") if name == "plain" else (f"{told.bleu - told.baseline:+.2f}", f"{told.p_value:.3f}")
        lines.append(f"| {SYSTEMS[name]} | {told.bleu:.2f} | {beside[0]} | {beside[1]} |")
    return lines


def num_rows(store: Path) -> int:
    """Rows of a datastore."""
    return int(json.loads((store / "datastore.json").read_text(encoding="utf-8"))["rows"])


def write(out: Path, about: str, chosen: dict[str, str], valid: dict[str, float], test: dict[str, Compared]) -> str:
    """Write results.json and results.md; returns the text of results.md."""
    text = "\n".join([about, "", *table(test)]) + "\n"
    record = {"chosen": chosen, "valid": valid, "test": {name: asdict(told) for name, told in test.items()}}
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "results.md", text)
    return text


def report_of_one(out: Path) -> str:
    """The tables and the plot of run.sh's folder."""
    k, share = best(out, ("k", "share"))
    (temperature,) = best(out, ("temp",))
    found = compared(out, list(SYSTEMS))
    about = (
        f"Multi30k de-en, {len(texts(out, 'plain'))} test sentences, {SETTING}; datastore of the training pairs, "
        f"{num_rows(out / 'plain' / 'store'):,} rows, IVF index, probe 8. Chosen on valid: k {k} and share {share} at "
        f"temperature 10 (kNN-MT), temperature {temperature} at k 8 (TrimeMT)."
    )
    valid = {f"k {values[0]}, share {values[1]}": bleu for values, bleu in sorted(swept(out, ("k", "share")).items())}
    draw(out, out / "bleu.png")
    return write(out, about, {"k": k, "share": share, "temperature_trime": temperature}, valid, found)


def report_of_domain(out: Path) -> str:
    """The table of domain.sh's folder."""
    temperature, share = best(out, ("temp", "share"))
    about = (
        f"LibreOffice's interface de-en by a model of captions, {len(texts(out, 'plain'))} test sentences, {SETTING}; "
        f"datastore of other strings, {num_rows(out / 'store'):,} rows, IVF index, probe 16, k 8. Chosen on valid: "
        f"temperature {temperature}, share {share}."
    )
    swept_here = sorted(swept(out, ("temp", "share")).items())
    valid = {f"temperature {values[0]}, share {values[1]}": bleu for values, bleu in swept_here}
    chosen = {"temperature": temperature, "share": share}
    return write(out, about, chosen, valid, compared(out, ("plain", "knn", "adaptive")))


def draw(out: Path, path: Path) -> None:
    """BLEU on valid against the share of the neighbours, a line per k."""
    from matplotlib.figure import Figure

    found = swept(out, ("k", "share"))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k in sorted({k for k, _ in found}, key=int):
        points = sorted((float(share), bleu) for (other, share), bleu in found.items() if other == k)
        axes.plot(*zip(*points), "o-", label=f"k = {k}")
    plain = figures(out / "plain.valid", "valid")["bleu"]
    axes.axhline(plain, linestyle="--", color="#555555", label=f"model alone: {plain:.2f}")
    axes.set_xlabel("share of the neighbours (--lmbda)")
    axes.set_ylabel("BLEU on valid")
    axes.legend()
    figure.savefig(path, dpi=150)


def report_of_seeds(folders: Sequence[Path]) -> str:
    """A table of means over runs with different seeds, lowest to highest."""
    missing = next((folder for folder in folders if not (folder / "results.json").exists()), None)
    if missing is not None:
        raise ValueError(f"{missing} holds no results.json; run run.sh and report.py on it first")
    records = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["test"] for folder in folders]
    lines = [f"| | BLEU, mean of {len(records)} (lowest to highest) | above the model alone |", "|---|---|---|"]
    for name in (name for name in SYSTEMS if name in records[0]):
        bleus = [record[name]["bleu"] for record in records]
        above = sum(record[name]["bleu"] > record["plain"]["bleu"] for record in records)
        told = "" if name == "plain" else f"{above} of {len(records)}"
        lines.append(
            f"| {SYSTEMS[name]} | {statistics.mean(bleus):.2f} ({min(bleus):.2f} to {max(bleus):.2f}) | {told} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Print the table of one folder or of several, or what was chosen on valid."""
    parser = FlagParser("report.py", "The table and the plot of run.sh and domain.sh.")
    parser.add_config(ReportConfig)
    config = build(ReportConfig, parser.parse(argv))
    folders = [Path(folder) for folder in config.folders]
    if config.chosen:
        text = " ".join(best(folders[0], config.chosen.split(","))) + "\n"
    elif len(folders) > 1:
        text = report_of_seeds(folders)
    else:
        text = report_of_domain(folders[0]) if config.domain else report_of_one(folders[0])
    sys.stdout.write(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"report.py: error: {error}\n")
        sys.exit(2)
