"""Evaluation on the validation pairs, with and without the datastore: a line for each pair, and the figures of all.

Pairs are evaluated in blocks; a block is the same whatever the number of processes, and is written whole: what a killed
run has written is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq.hf.hooks.identity import model_digest
from fairseq.hf.knn.evaluation import evaluate
from fairseq.hf.knn.generation import generate_texts
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.dataset import Pairs, open_pairs
from fairseq.hf.pipeline.fabric import check_devices, launch
from fairseq.hf.pipeline.identity import config_digest
from fairseq.hf.pipeline.models import Base, load_model, tuned_model
from fairseq.hf.pipeline.saving import on_device, open_finished, store_prefix
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.retrieval.made_of import facts_of_store
from fairseq.metrics.bleu import score_texts
from fairseq.metrics.text_match import exact_match, rouge
from fairseq.runtime.atomic_files import require_writable, writing
from fairseq.runtime.files import locked, may_create_in, write_json
from fairseq.runtime.manifest import file_digest
from fairseq.runtime.records import OBJECT, TEXT, Fields, read_record

logger = logging.getLogger(__name__)

_BATCHES_PER_BLOCK = 4
_LARGEST_NLL = 709.0  # a float holds e to this power
RESULTS, EXAMPLES = "results.json", "examples.jsonl"
_RECORD = Fields({"signature": OBJECT, "figures": OBJECT}, {"examples": TEXT})


@dataclass(frozen=True)
class Evaluated:
    """Figures of the model alone and, where there is one, with its datastore."""

    figures: Mapping[str, Mapping[str, float | str]]
    """``model`` and ``knn`` -> name -> value; an infinite one is a text, as in JSON."""
    was_complete: bool
    seconds: float


def evaluate_pairs(config: PipelineConfig) -> Evaluated | None:
    """Evaluate, or resume. None in all processes but the first.

    Raises: ValueError before the long part when the store is missing, contradicts the config, or is of another model.
    """
    check_devices(config)
    folder = Path(config.evaluation.out_dir)
    require_writable(folder, "evaluation.out_dir")
    base = Base.of(config)
    name = tuned_model(config, base)
    pairs = open_pairs(base.encoder, "validation")
    store = open_finished(config) if config.model.enable_knn else None
    model = load_model(base, name, config.fabric.precision)
    if store is not None:
        _require_same_model(store, model, name)
    signature = _signature(config, model, pairs, store)
    if (folder / RESULTS).exists():
        made = read_record(folder / RESULTS, _RECORD)
        if made["signature"] == signature and _examples_are_whole(folder, made.get("examples")):
            _remove_parts(folder, signature)
            return Evaluated(made["figures"], True, 0.0)
    started = time.perf_counter()
    fabric = launch(config)
    may_create_in(folder)
    blocks = _blocks(config, pairs)
    rank, world = fabric.global_rank, fabric.world_size
    first, end = (len(blocks) * at // world for at in (rank, rank + 1))
    part = _part(folder, rank, world)
    # Two that append to one file would make one of neither.
    with on_device(fabric, model), locked(part.with_suffix(".lock"), str(part)):
        _evaluate_blocks(config, base, model, pairs, blocks[first:end], part, signature)
    fabric.barrier()
    if rank != 0:
        return None
    parts = [_part(folder, number, world) for number in range(world)]
    lines = [line for each in parts for line in _lines(each)[1:]]
    _write_lines(folder / EXAMPLES, lines)
    figures = _figures(config, [json.loads(line) for line in lines])
    record = {"signature": signature, "figures": figures, "examples": file_digest(folder / EXAMPLES)}
    write_json(folder / RESULTS, record)
    _remove_parts(folder, signature)
    return Evaluated(figures, False, time.perf_counter() - started)


def _examples_are_whole(folder: Path, digest: str | None) -> bool:
    """False where the lines of a finished evaluation are gone. Raises: ValueError when they are others."""
    path = folder / EXAMPLES
    if not path.exists():
        return False
    if digest != file_digest(path):
        raise ValueError(
            f"{path} is not what {folder / RESULTS} was computed from (digest {file_digest(path)[:19]}, recorded "
            f"{str(digest)[:19]}): it was changed; move it away to evaluate again, or name another evaluation.out_dir"
        )
    return True


def _remove_parts(folder: Path, signature: Mapping[str, Any]) -> None:
    """Remove the lines of a finished evaluation, by whatever number of processes; those of another one are kept."""
    for part in folder.glob("unfinished-*.jsonl"):
        if _lines(part)[:1] == [_head(signature)]:
            part.unlink()
            part.with_suffix(".lock").unlink(missing_ok=True)


def _head(signature: Mapping[str, Any]) -> str:
    return json.dumps(signature, sort_keys=True) + "\n"


def _require_same_model(store: Datastore, model: Any, name: str) -> None:
    """Stores of earlier releases do not record the config."""
    digest, config = model_digest(model), config_digest(model.config)
    made = str(store.metadata.get("model_digest"))
    what = "model"
    if made == digest:
        what, made, digest = "config.json of the model", str(store.metadata.get("model_config", config)), config
    if made != digest:
        raise ValueError(
            f"datastore {store.prefix!r} was saved with another {what} (digest {made[:12]}) than {name!r} (digest "
            f"{digest[:12]}); give its model.checkpoint, or save a store of this one in another knn.store_dir"
        )


def _signature(config: PipelineConfig, model: Any, pairs: Pairs, store: Datastore | None) -> dict[str, Any]:
    """What the lines follow from."""
    search = config.evaluation
    chosen: dict[str, Any] = {"model": model_digest(model), "data": pairs.digest, "precision": config.fabric.precision}
    chosen |= {"metrics": list(search.metrics), "num_beams": search.num_beams, "max_examples": search.max_examples}
    chosen |= {"batch_size": config.data.eval_batch_size, "config": config_digest(model.config)}
    if search.metrics:
        chosen["generation_config"] = config_digest(model.generation_config)
    if store is None:
        return chosen
    knn = config.knn
    names = ("k", "lmbda", "temperature", "enable_retomaton", "min_knns", "probe", "index", "key_type")
    return chosen | {"store": facts_of_store(store), "knn": [getattr(knn, name) for name in names]}


def _blocks(config: PipelineConfig, pairs: Pairs) -> list[range]:
    count = min(len(pairs), config.evaluation.max_examples or len(pairs))
    size = config.data.eval_batch_size * _BATCHES_PER_BLOCK
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _part(folder: Path, rank: int, world: int) -> Path:
    return folder / f"unfinished-{rank}-of-{world}.jsonl"


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a kill may have left half of one."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with writing(path) as file:
        file.writelines(lines)


def _evaluate_blocks(
    config: PipelineConfig,
    base: Base,
    model: Any,
    pairs: Pairs,
    blocks: Sequence[range],
    part: Path,
    signature: Mapping[str, Any],
) -> None:
    """Append the lines of blocks to a file that begins with the signature."""
    head, lines = _head(signature), _lines(part)
    if lines[:1] != [head]:
        lines = [head]
    ends = [1, *(1 + count for count in itertools.accumulate(map(len, blocks)))]
    done = max(number for number, end in enumerate(ends) if end <= len(lines))
    _write_lines(part, lines[: ends[done]])
    if done == len(blocks):
        return
    memory = _memory(config, base)
    with memory(model) if memory is not None else contextlib.nullcontext(), part.open("a", encoding="utf-8") as file:
        for number, block in enumerate(blocks[done:], done + 1):
            file.writelines(_block_lines(config, base, model, memory, pairs, block))
            file.flush()
            os.fsync(file.fileno())
            logger.info("%d of %d blocks are evaluated", number, len(blocks))


def _memory(config: PipelineConfig, base: Base) -> KNNWrapper | None:
    knn = config.knn
    if not config.model.enable_knn:
        return None
    shared: dict[str, Any] = {
        "dstore_dir": store_prefix(config),
        "knn_keytype": knn.key_type,
        "k": knn.k,
        "lmbda": knn.lmbda,
        "knn_temp": knn.temperature,
        "probe": knn.probe,
        "tokenizer": base.tokenizer,
    }
    return RetomatonWrapper(min_knns=knn.min_knns, **shared) if knn.enable_retomaton else KNNWrapper(**shared)


def _block_lines(
    config: PipelineConfig, base: Base, model: Any, memory: KNNWrapper | None, pairs: Pairs, block: range
) -> Iterator[str]:
    """Evaluate a block; yields a line of JSON for each pair."""
    size = config.data.eval_batch_size
    before = (memory.num_positions, memory.num_searched) if isinstance(memory, RetomatonWrapper) else (0, 0)
    pieces: list[Any] = [pairs.piece(number) for number in block]
    scores = evaluate(model, pieces, memory, batch_size=size)
    lengths = [int(pairs.lengths[number]) for number in block]
    logp = {"model": torch.split(scores.lm_logp.double(), lengths)}
    paused: dict[str, Any] = {"model": memory.paused if memory is not None else contextlib.nullcontext}
    if memory is not None:
        logp["knn"], paused["knn"] = torch.split(scores.logp.double(), lengths), contextlib.nullcontext
    entries: list[dict[str, Any]] = []
    for place, number in enumerate(block):
        texts = pairs.texts(number)
        entry = {"number": number, "input": texts.input, "output": texts.output, "tokens": lengths[place]}
        entries.append(entry | {f"{way}_logp": _in_json(float(each[place].sum())) for way, each in logp.items()})
    if isinstance(memory, RetomatonWrapper):
        positions, searched = memory.num_positions - before[0], memory.num_searched - before[1]
        for entry in entries:
            entry["block_saved_share"] = 1.0 - searched / positions
    if config.evaluation.metrics:
        inputs = [pairs.input_ids(number) for number in block]
        settings = {"max_new_tokens": config.data.max_output_length, "num_beams": config.evaluation.num_beams}
        settings |= {"do_sample": False, "eos_token_id": base.tokenizer.eos_token_id}
        settings |= {"pad_token_id": base.tokenizer.pad_token_id or 0}
        for way, pause in paused.items():
            with pause():
                texts_of_way = generate_texts(model, base.tokenizer, inputs, settings, size)
            for entry, text in zip(entries, texts_of_way):
                entry[f"{way}_text"] = text.strip()
    yield from (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _in_json(value: float) -> float | str:
    """A number as JSON has it; infinity (knn.lambda 1 and no neighbour with the token) is a text ``float`` reads."""
    return value if math.isfinite(value) else str(value)


def _figures(config: PipelineConfig, entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | str]]:
    """The figures of all lines."""
    tokens = sum(entry["tokens"] for entry in entries)
    found: dict[str, dict[str, float | str]] = {}
    for way in ("model", "knn"):
        if f"{way}_logp" not in entries[0]:
            continue
        nll = -math.fsum(float(entry[f"{way}_logp"]) for entry in entries) / tokens
        perplexity = _in_json(math.exp(nll) if nll < _LARGEST_NLL else math.inf)
        found[way] = {"perplexity": perplexity, "pairs": len(entries), "tokens": tokens}
        if config.evaluation.metrics:
            found[way] |= _text_figures(config, way, entries)
    if "block_saved_share" in entries[0]:
        shares = (entry["block_saved_share"] * entry["tokens"] for entry in entries)
        found["knn"]["saved_share"] = math.fsum(shares) / tokens
    return found


def _text_figures(config: PipelineConfig, way: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    texts, references = [entry[f"{way}_text"] for entry in entries], [entry["output"] for entry in entries]
    found: dict[str, float] = {}
    for metric in config.evaluation.metrics:
        if metric == "exact_match":
            found["exact_match"] = exact_match(texts, references)
        elif metric == "bleu":
            found["bleu"] = score_texts("sacrebleu", texts, references).figures["bleu"]
        else:
            found |= rouge(texts, references)
    return found
