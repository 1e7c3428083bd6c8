"""How long the demo takes on this machine: time a few updates, then add up the stages that are still to do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from fairseq.config import FlagParser, build, flag
from fairseq.runtime.atomic_files import write_atomically
from fairseq_cli.entry import run

REFERENCE_UPDATES = 250
"""Updates of each training that COSTS counts."""


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """The demo that is to run; its stages come on standard input, each as "CHAIN STAGE"."""

    folder: str = flag("folder")
    """The demo's folder; prediction.json goes there."""
    updates: int = flag("--updates", default=REFERENCE_UPDATES)
    """Updates of each training."""
    side_by_side: int = flag("--side-by-side", default=1)
    """Chains that run at once."""
    threads: int = flag("--threads", default=1)
    """Threads of each."""
    measure: bool = flag("--measure", default=False)
    """Only measure this machine in this process, and print the result as JSON."""


@dataclass(frozen=True)
class Speed:
    """Two figures of a machine that is as busy as the demo makes it."""

    import_seconds: float
    """Starting Python and importing numpy."""
    update_seconds: float
    """An update of a model of the demo's shape, without memory."""


@dataclass(frozen=True)
class Cost:
    """What a stage takes, in the two figures of a machine."""

    imports: float
    updates: float

    def seconds(self, speed: Speed) -> float:
        """On a machine of that speed."""
        return self.imports * speed.import_seconds + self.updates * speed.update_seconds


_START = 13.0  # a command's own start and imports
COSTS = {
    "data": Cost(_START, 10),
    "segments": Cost(_START, 0),
    "bm25": Cost(_START, 28),
    "batches": Cost(5, 0),
    "external-train": Cost(2 * _START, 300),
    "store": Cost(_START, 140),
    "index": Cost(_START, 90),
    "external.valid": Cost(_START, 64),
    "external.test": Cost(_START, 45),
    "plain-train": Cost(2 * _START, 235),
    "plain.valid": Cost(_START, 7),
    "plain.test": Cost(_START, 5),
    "knn-store": Cost(_START, 140),
    "knn-index": Cost(_START, 90),
    "knn.valid": Cost(_START, 120),
    "knn.test": Cost(_START, 57),
    "knn-sweep": Cost(_START, 3),
    "long-train": Cost(2 * _START, 280),
    "long.valid": Cost(_START, 14),
    "long.test": Cost(_START, 10),
    "local-train": Cost(2 * _START, 250),
    "local.valid": Cost(_START, 8),
    "local.test": Cost(_START, 6),
}
"""What the stages take where two run side by side, each on a core of its own."""
AROUND = Cost(40, 4)
"""This prediction and the report."""
BYTECODE = Cost(70, 0)
"""Compiling the packages that the commands import, which Python does once."""
KERNELS = Cost(90, 0)
"""Compiling kernels for this CPU, once a user."""


def measure(threads: int) -> Speed:
    """Take both figures in this process."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 2002))
    optimizer = torch.optim.Adam(model.parameters())
    state_BTD, target_N = torch.randn(32, 64, 128), torch.randint(2002, (2048,))

    def update() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(state_BTD).flatten(0, 1), target_N).backward()
        optimizer.step()

    def importing() -> None:
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)

    return Speed(import_seconds=_median_seconds(importing, 2), update_seconds=_median_seconds(update, 3))


def _median_seconds(work: Callable[[], None], repeats: int) -> float:
    work()  # the first one allocates memory and reads files
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_side_by_side(processes: int, threads: int) -> Speed:
    """The slowest figures of so many processes that measure at once: cores may share caches, memory and clock."""
    command = [sys.executable, __file__, "-", "--measure", "--threads", str(threads)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    speeds = [Speed(**json.loads(process.communicate()[0])) for process in running]
    return Speed(max(s.import_seconds for s in speeds), max(s.update_seconds for s in speeds))


def compiled_first() -> list[Cost]:
    """What is compiled by the first demo on a machine, or in a new environment, and is kept for the others."""
    from fairseq.memory.index.ops.kernel_cache import cache_folder

    package, folder = find_spec("lightning"), cache_folder()
    source = None if package is None else package.origin
    missing = [] if source is None or os.path.exists(cache_from_source(source)) else [BYTECODE]
    return missing if folder is not None and any(folder.glob("*")) else [*missing, KERNELS]


def read_stages(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(chain, stage) of each line. Raises: ValueError for a stage that COSTS does not know."""
    stages = [(chain, name) for chain, name in map(str.split, lines)]
    for _, name in stages:
        if name not in COSTS:
            raise ValueError(f"stage {name} is not in COSTS of {Path(__file__).name}; add what it takes")
    return stages


def predict(
    stages: Sequence[tuple[str, str]], speed: Speed, slots: int, updates: int, once: Sequence[Cost] = ()
) -> float:
    """Wall-clock seconds of stages: chain "-" by itself, then the others in their order, ``slots`` at once.

    Args:
        once: what is done once, by all that run at first.
    """
    chains: dict[str, float] = {}
    for chain, name in stages:
        cost = COSTS[name]
        if name.endswith("-train"):
            cost = Cost(cost.imports, cost.updates * updates / REFERENCE_UPDATES)
        chains[chain] = chains.get(chain, 0.0) + cost.seconds(speed)
    free_at = [chains.pop("-", 0.0)] * slots
    for seconds in chains.values():
        free_at[free_at.index(min(free_at))] += seconds
    return max(free_at) + sum(cost.seconds(speed) for cost in (AROUND, *(once if chains else ())))


def main(argv: Sequence[str]) -> None:
    """Print how long the demo takes, and write prediction.json."""
    parser = FlagParser("shakespeare_demo_time.py", "Predict how long the demo takes on this machine.")
    parser.add_config(TimeConfig)
    config = build(TimeConfig, parser.parse(argv))
    if config.measure:
        sys.stdout.write(json.dumps(asdict(measure(config.threads))) + "\n")
        return
    stages = read_stages(sys.stdin)
    chains = {chain for chain, _ in stages} - {"-"}
    slots = min(config.side_by_side, max(1, len(chains)))
    once = compiled_first()
    speed = measure_side_by_side(slots, config.threads)
    seconds = predict(stages, speed, slots, config.updates, once)
    write_atomically(Path(config.folder) / "prediction.json", json.dumps({"seconds": seconds} | asdict(speed)) + "\n")
    download = ", and the download" if "data" in {name for _, name in stages} else ""
    todo = f"{len(stages)} stages to do, {slots} at once"
    sys.stdout.write(f"This takes about {_readable(seconds)} on this machine{download}: {todo}\n")


def _readable(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


if __name__ == "__main__":
    run("shakespeare_demo_time.py", main)
