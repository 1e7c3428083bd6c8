"""A language model in a domain it was not made for: alone, with a datastore (kNN-LM), with an automaton (RetoMaton).

    python examples/huggingface/domain_adaptation.py --out output/domain-shakespeare

Fetches SmolLM2-135M-Instruct and Shakespeare's plays unless told otherwise, saves a datastore of the training text,
chooses lambda and temperature on the validation text and reports what the test text shows: results.md, results.json,
saved_searches.png. Started again, it keeps the datastore and its clusters.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clm_data
import torch
import transformers
from domain_report import Row, write_report
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairseq.config import FlagParser, build, flag, require_at_least, to_dict
from fairseq.hf.knn.evaluation import Window, evaluate, save_datastore, windows_of
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.retomaton.build_clusters import build_clusters
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq.memory.scoring import interpolate, knn_logp
from fairseq.runtime.manifest import write_manifest
from fairseq_cli.data import get_data
from fairseq_cli.entry import run

logger = logging.getLogger("domain_adaptation")

_PROGRAM = "domain_adaptation.py"
_WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0)
_ALWAYS = 9_999_999  # searches at every token, as in knn-transformers' README
_MIN_KNNS = (1, 8, 32, 128, 512, 1024, _ALWAYS)
_STORE_NAME = "store"


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """Model, texts and sizes."""

    out: str = flag("--out", default="output/domain-shakespeare")
    """Folder of the datastore and the results."""
    model: str | None = flag("--model", default=None)
    """Folder of the model; by default SmolLM2-135M-Instruct, fetched into models/smollm2."""
    train_file: str | None = flag("--train_file", default=None)
    """Text of the datastore; by default Shakespeare's plays, fetched."""
    valid_file: str | None = flag("--valid_file", default=None)
    """Text on which lambda and temperature are chosen."""
    test_file: str | None = flag("--test_file", default=None)
    """Text that the results are of."""
    train_tokens: int = flag("--train_tokens", default=100_000)
    """Tokens of the datastore's text, at most."""
    valid_tokens: int = flag("--valid_tokens", default=4_000)
    """Tokens of the validation text, at most."""
    test_tokens: int = flag("--test_tokens", default=8_000)
    """Tokens of the test text, at most."""
    block_size: int = flag("--block_size", default=256)
    """Tokens of a window; each is read from half a window before on."""
    batch_size: int = flag("--batch_size", default=4)
    """Windows that are read at once."""
    k: int = flag("--k", default=256)
    """Neighbours per token: of some 100,000 keys, farther ones weigh next to nothing."""
    num_clusters: int | None = flag("--num_clusters", default=None)
    """Clusters of the datastore; by default one for 100 rows."""
    dtype: str = flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    """Type of the weights; auto is bfloat16 where the processor multiplies it fast."""

    def __post_init__(self) -> None:
        counts = ("k", "batch_size", "num_clusters")
        require_at_least(1, between="_", **{name: getattr(self, name) for name in counts})
        sizes = ("train_tokens", "valid_tokens", "test_tokens", "block_size")
        require_at_least(2, between="_", **{name: getattr(self, name) for name in sizes})
        given = [path for path in self.texts() if path is not None]
        if given and len(given) < 3:
            raise ValueError("--train_file, --valid_file and --test_file belong together; give all three or none")
        for path in given:
            if not Path(path).is_file():
                raise ValueError(f"no such file: {path}")

    def texts(self) -> tuple[str | None, str | None, str | None]:
        """The three texts."""
        return self.train_file, self.valid_file, self.test_file


@dataclass(frozen=True)
class Texts:
    """Windows of the three texts; those of the datastore do not overlap."""

    train: list[Window]
    valid: list[Window]
    test: list[Window]


class Grid(KNNWrapper):
    """Mixes with every share and temperature of a grid: neighbours are looked up once and combined many times."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sums = {(weight, heat): 0.0 for weight in _WEIGHTS for heat in _TEMPERATURES}

    def target_logp(
        self, key_ND: Tensor, lm_logp_N: Tensor, target_N: Tensor, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Add up the grid's log-probabilities; returns the model's own."""
        for keys, lm_logp, target in zip(*(torch.split(each.cpu(), 1024) for each in (key_ND, lm_logp_N, target_N))):
            found = self.memory.lookup(keys)
            for heat in _TEMPERATURES:
                neighbors = knn_logp(found, target, heat)
                for weight in _WEIGHTS:
                    self.sums[weight, heat] += float(interpolate(lm_logp, neighbors, weight).double().sum())
        return lm_logp_N.cpu()

    def best(self) -> tuple[float, float]:
        """Share and temperature that give the text the highest probability."""
        return max(self.sums, key=self.sums.__getitem__)


def main(argv: Sequence[str]) -> None:
    """Fetch, save, cluster, choose, measure, report."""
    parser = FlagParser(_PROGRAM, "Compare a language model with kNN-LM and RetoMaton in a new domain.")
    parser.add_config(DomainConfig)
    config = build(DomainConfig, parser.parse(argv))
    started = time.perf_counter()
    model, tokenizer, texts = prepare(config)
    store = make_store(config, model, tokenizer, texts.train)
    weight, heat = choose(config, model, tokenizer, texts.valid)
    memory = shared(config, tokenizer) | {"lmbda": weight, "knn_temp": heat}
    rows = [
        measure("the model alone", config, model, texts.test, None),
        measure("kNN-LM", config, model, texts.test, KNNWrapper(**memory)),
    ]
    for min_knns in _MIN_KNNS:
        automaton = RetomatonWrapper(**memory, min_knns=min_knns)
        name = f"RetoMaton, --min-knns {min_knns}"
        rows.append(measure(name, config, model, texts.test, automaton, min_knns=min_knns))
    about = {
        "model": config.model or "SmolLM2-135M-Instruct",
        "dtype": str(model.dtype).removeprefix("torch."),
        "datastore_rows": len(store),
        "lmbda": weight,
        "knn_temp": heat,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }
    sys.stdout.write(write_report(Path(config.out), rows, about))
    figures = about | {"rows": [row.to_dict() for row in rows]}
    write_manifest(
        Path(config.out) / "results.run.json", program=_PROGRAM, argv=argv, config=to_dict(config), figures=figures
    )


def prepare(config: DomainConfig) -> tuple[Any, Any, Texts]:
    """Model, tokenizer and windows; what is not there is fetched. Raises: ValueError when they do not go together."""
    folder, paths = config.model or "models/smollm2", config.texts()
    if config.model is None:
        get_data.main(["smollm2", folder])
    if paths[0] is None:
        get_data.main(["shakespeare", "--text-only"])
        paths = tuple(f"downloads/shakespeare/{split}.txt" for split in ("train", "valid", "test"))
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of a model; bash get_data.sh smollm2 {folder} makes one")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights_type(config.dtype)).eval()
    size = clm_data.window_size(config.block_size, model.config, tokenizer)
    windows = []
    most = (config.train_tokens, config.valid_tokens, config.test_tokens)
    for number, (path, count) in enumerate(zip(paths, most)):
        with open(str(path), encoding="utf-8") as file:
            lines = list(file)
        ids = torch.cat(clm_data.tokenize(lines, tokenizer, 1000))[:count]
        logger.info("%s: %d tokens", path, len(ids))
        windows.append(windows_of(ids, size, size // 2 if number else size))
    return model, tokenizer, Texts(*windows)


def weights_type(name: str) -> torch.dtype:
    """The type of the weights by its name."""
    if name == "auto":
        name = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return getattr(torch, name)


def make_store(config: DomainConfig, model: Any, tokenizer: Any, windows: list[Window]) -> Datastore:
    """Save the datastore and its clusters, unless they are there."""
    prefix = str(Path(config.out) / _STORE_NAME)
    if not StoreFiles.of(prefix, "float16").metadata.exists():
        Path(config.out).mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with KNNSaver(dstore_dir=config.out, name=_STORE_NAME, tokenizer=tokenizer)(model) as saver:
            rows = save_datastore(model, windows, saver, batch_size=config.batch_size)
        logger.info("saved %d keys in %.0f s", rows, time.perf_counter() - started)
    store, rows = Datastore.open(prefix), sum(len(window.ids_T) - 1 for window in windows)
    if len(store) != rows:
        raise ValueError(
            f"{prefix} has {len(store)} rows of another command, the text makes {rows}; give another --out or remove it"
        )
    build_clusters(ClusterConfig(dstore_mmap=prefix, num_clusters=config.num_clusters))
    return store


def shared(config: DomainConfig, tokenizer: Any) -> dict[str, Any]:
    """What every wrapper is told."""
    return {"dstore_dir": str(Path(config.out) / _STORE_NAME), "k": config.k, "tokenizer": tokenizer}


def choose(config: DomainConfig, model: Any, tokenizer: Any, windows: list[Window]) -> tuple[float, float]:
    """Share of the neighbours and temperature that suit the validation text best."""
    grid = Grid(**shared(config, tokenizer))
    with grid(model):
        evaluate(model, windows, grid, batch_size=config.batch_size)
    logger.info("lambda %g and temperature %g are best on the validation text", *grid.best())
    return grid.best()


def measure(
    name: str,
    config: DomainConfig,
    model: Any,
    windows: list[Window],
    memory: KNNWrapper | None,
    min_knns: int | None = None,
) -> Row:
    """Evaluate the test text in one way."""
    with watching_memory() as peak, memory(model) if memory is not None else nullcontext():
        scores = evaluate(model, windows, memory, batch_size=config.batch_size)
    saved = memory.saved_share if isinstance(memory, RetomatonWrapper) else None
    row = Row(name, scores.perplexity, len(scores.logp), scores.tokens_per_second, saved, peak(), min_knns)
    logger.info("%s: perplexity %.2f, %.0f tokens/s", name, row.perplexity, row.tokens_per_second)
    return row


@contextmanager
def watching_memory() -> Iterator[Any]:
    """Yields a function that tells the largest resident memory since, in MB; None where the system does not tell."""
    gc.collect()
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        clear.write_text("5")  # Linux: the mark of the peak is set back
    except OSError:
        yield lambda: None
        return

    def peak() -> float:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    yield peak


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    run(_PROGRAM, main)
