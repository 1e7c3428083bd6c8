"""The table of run.sh: python examples/memory_decoder/report.py FOLDER...

With several folders, one per seed, it prints means with their spread.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.config import FlagParser, build, flag
from fairseq.runtime.atomic_files import write_atomically
from fairseq_cli.entry import run

DECODERS = {
    "decoder": "memory decoder (train.py)",
    "transformers": "memory decoder (transformers)",
    "text-decoder": "the same decoder, of the text alone",
}
NAMES = {"lm": "language model", "knn": "kNN-LM", **DECODERS}
WEIGHTS = np.arange(0, 0.91, 0.02)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of the report."""

    folders: tuple[str, ...] = flag("folders")
    """Folders that run.sh made, one per seed."""
    best: str | None = flag("--best", default=None, choices=("softmax_temp", *DECODERS))
    """Print what was best on valid alone: the temperature of the neighbours, or the share of a decoder."""


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def logp(out: Path, name: str, split: str) -> np.ndarray[Any, Any]:
    """Log-probability of every token of a split, in its order."""
    with np.load(out / f"{name}.{split}.npz") as file:
        return np.asarray(file["logp"])


def perplexity(lm: np.ndarray[Any, Any], decoder: np.ndarray[Any, Any], weight: float) -> float:
    """Of the mixture with this share of the decoder."""
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(np.log1p(-weight) + lm, np.log(weight) + decoder)
    return float(np.exp(-mixed.mean()))


def best_weight(out: Path, name: str) -> float:
    """The share that is best on valid."""
    lm, decoder = logp(out, "lm", "valid"), logp(out, name, "valid")
    if lm.shape != decoder.shape:
        raise ValueError(f"{out}/{name}.valid.npz has {len(decoder)} tokens, lm.valid.npz {len(lm)}; score it again")
    return float(min(WEIGHTS, key=partial(perplexity, lm, decoder)))


def weight_bytes(path: Path) -> int:
    """Bytes of a model's weights in float32: of a checkpoint of ours, or of a folder of transformers."""
    if path.is_dir():
        return (path / "model.safetensors").stat().st_size
    import torch

    model = torch.load(path, weights_only=True, map_location="cpu")["model"]
    held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.values()}
    return sum(held.values())


def seconds(out: Path, names: Sequence[str]) -> float:
    """Of some stages."""
    return sum(float((out / f"{name}.seconds").read_text(encoding="utf-8")) for name in names)


def figures_of(out: Path) -> dict[str, dict[str, float]]:
    """Perplexities, bytes and seconds of one folder, by line of the table."""
    swept = read(out / "knn.json")
    store = sum((out / f"store_{part}.npy").stat().st_size for part in ("keys", "vals"))
    lm = {split: read(out / f"lm.{split}.json") for split in ("valid", "test")}
    found: dict[str, dict[str, float]] = {
        "lm": {split: lm[split]["perplexity"] for split in lm},
        "knn": {
            "valid": swept["best"]["perplexity"],
            "test": swept["reported"]["perplexity"],
            "bytes": store,
            "seconds": seconds(out, ["neighbors-test"]),
            "weight": swept["best"]["lmbda"],
        },
    }
    found["lm"]["seconds"] = seconds(out, ["lm-test"])
    for name in DECODERS:
        if not (out / f"{name}.test.npz").exists():
            continue
        weight = best_weight(out, name)
        path = out / name if name == "transformers" else out / name / "checkpoint_best.pt"
        found[name] = {
            split: perplexity(logp(out, "lm", split), logp(out, name, split), weight) for split in ("valid", "test")
        }
        found[name] |= {
            "bytes": weight_bytes(path),
            "seconds": seconds(out, ["lm-test", f"{name}-test"]),
            "weight": weight,
        }
    gain = found["lm"]["test"] - found["knn"]["test"]
    for name in DECODERS:
        if name in found:
            found[name]["kept"] = (found["lm"]["test"] - found[name]["test"]) / gain if gain > 0 else float("nan")
            found[name]["of_bytes"] = found[name]["bytes"] / store
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Mean of a figure over the seeds, and its range."""
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def table(found: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    """The lines, a system each."""
    columns = {
        "valid": "{:.2f}", "test": "{:.2f}", "weight": "{:.2f}", "kept": "{:.0%}", "bytes": "{:,.0f}",
        "of_bytes": "{:.1%}", "seconds": "{:.0f}",
    }  # fmt: skip
    heads = ["valid", "test", "share", "gain kept", "bytes", "of the store", "seconds of test"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, words in NAMES.items():
        rows = [each[name] for each in found if name in each]
        if rows:
            cells = [spread([row[c] for row in rows], form) if c in rows[0] else "" for c, form in columns.items()]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str]) -> None:
    """Print the table, and leave it in the folder of a single seed."""
    parser = FlagParser("report.py", ReportConfig.__doc__ or "")
    parser.add_config(ReportConfig)
    config = build(ReportConfig, parser.parse(argv))
    if not config.folders:
        raise ValueError("give a folder that examples/memory_decoder/run.sh made")
    folders = [Path(folder) for folder in config.folders]
    if config.best == "softmax_temp":
        sys.stdout.write(f"{read(folders[0] / 'knn.json')['best']['softmax_temp']}\n")
        return
    if config.best:
        sys.stdout.write(f"{best_weight(folders[0], config.best):.2f}\n")
        return
    found = [figures_of(folder) for folder in folders]
    text = "\n".join(table(found)) + "\n"
    if len(folders) == 1:
        write_atomically(folders[0] / "results.json", json.dumps(found[0], indent=1) + "\n")
        write_atomically(folders[0] / "results.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    run("report.py", main)
