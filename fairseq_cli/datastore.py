"""Look after datastores: fairseq-datastore COMMAND PREFIX ..."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.datastore.config import (
    ConvertConfig,
    DeleteConfig,
    DoctorConfig,
    InfoConfig,
    MergeConfig,
    QuantizeConfig,
    SampleConfig,
    StoreConfig,
    VerifyConfig,
)
from fairseq.memory.index.sharded.config import RunShardsConfig, ServeConfig
from fairseq.memory.planning.config import PlanConfig
from fairseq.memory.retrieval.soft_targets_config import ExportTargetsConfig
from fairseq.registry import Entry, lookup
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

PROGRAM = "fairseq-datastore"
_COMMAND = "--"  # before the command that run-shards runs


def _open(config: StoreConfig) -> Datastore:
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.datastore.describe import StoreHints

    hints = StoreHints(config.dimension, config.dstore_size, config.dstore_fp16, config.dstore_bf16)
    store = Datastore.open(config.prefix, hints)
    return store.require(size=config.dstore_size)


def info(config: InfoConfig, argv: Sequence[str]) -> None:
    """Print what the store holds."""
    from fairseq.memory.datastore.info import describe

    figures = describe(_open(config))
    if config.json:
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    parts = figures.pop("parts")
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")
    for part in parts if len(parts) > 1 else ():
        sys.stdout.write(f"part: {part['prefix']} ({part['rows']} rows)\n")


def verify(config: VerifyConfig, argv: Sequence[str]) -> None:
    """Print what is damaged, or that nothing is; everything is looked at before the first damage is raised."""
    failures: list[Exception] = []
    for path in config.paths:
        for name, check in _things(config, path):
            try:
                sys.stdout.write(f"{name}: {check()}\n")
            except (ValueError, OSError) as error:
                # The first is raised at the end, and not printed twice.
                reason = " ".join(str(error).split()) if failures else "damaged or not verified; see the error"
                sys.stdout.write(f"{name}: {reason}\n")
                failures.append(error)
    if failures:
        raise failures[0]


def _things(config: VerifyConfig, path: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """What a path names, each with the check that returns the rest of its line."""
    from fairseq.verification.kinds import verify as outcome
    from fairseq.verification.recognition import contents, recognised

    try:
        kinds = recognised(path)
    except (ValueError, OSError) as error:
        yield path, partial(_raise, error)
        return
    for kind, name in kinds:
        shown = path if len(kinds) == 1 and not Path(path).is_dir() else _shown(kind, name)
        if kind == "datastore":
            yield shown, partial(_verify_store, replace(config, prefix=str(name)))
        else:
            yield shown, partial(lambda kind, name: f"{kind}, {outcome(kind, name)}", kind, name)
    if not kinds or _holds_foreign(config, path, kinds):
        yield path, partial(_verify_foreign, config, path)
    elif Path(path).is_dir() and (unknown := contents(Path(path)).unknown):
        yield path, partial(_not_compared, unknown)


def _holds_foreign(config: VerifyConfig, path: str, kinds: Sequence[tuple[str, Path]]) -> bool:
    """True if a folder holds, beside what is ours, a store of another program whose sizes are known."""
    from fairseq.memory.datastore.foreign_formats import ForeignFiles

    if not Path(path).is_dir() or ("datastore", Path(path, "datastore")) in kinds:
        return False
    try:
        files = ForeignFiles.find(path, "float16" if config.dstore_fp16 else "float32")
    except ValueError:  # several
        return False
    return files.present() and (files.state_their_sizes or config.dimension is not None)


def _shown(kind: str, name: Path) -> str:
    from fairseq.memory.datastore.layout import StoreName

    return StoreName.of(name).prefix if kind == "datastore" else str(name)


def _raise(error: Exception) -> str:
    raise error


def _not_compared(names: Sequence[str]) -> str:
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"not compared, of no known kind: {listed}"


def _verify_foreign(config: VerifyConfig, path: str) -> str:
    """Look at arrays of another program; for anything else the message of a store says what is missing."""
    from fairseq.memory.datastore.foreign_formats import ForeignFiles

    here = Path(path)
    names = "name a datastore, an index, clusters, saved neighbours, a memory, binarised text, a checkpoint or a folder"
    if here.is_file():
        raise ValueError(f"{path!r} is no file of this toolkit, or damaged beyond recognition; {names}")
    if here.exists() and not here.is_dir():
        raise ValueError(f"{path!r} is neither a file nor a folder; {names}")
    if here.is_dir() and not ForeignFiles.find(path, "float16" if config.dstore_fp16 else "float32").present():
        held = sorted(each.name for each in here.iterdir())
        listed = f"holds nothing of this toolkit ({_not_compared(held)})" if held else "is an empty folder"
        raise ValueError(f"{path!r} {listed}; {names}")
    return _verify_store(replace(config, prefix=path))


def _verify_store(config: StoreConfig) -> str:
    """Compare a store with its checksums and count its invalid keys; every damaged block but the first is printed."""
    from fairseq.memory.datastore.info import count_keys
    from fairseq.memory.datastore.verify import damage
    from fairseq.verification.kinds import require_sealed_store

    store = _open(config)
    if store.metadata:
        require_sealed_store(store)
    found = list(damage(store.shards))
    for line in found[1:]:
        sys.stdout.write(line + "\n")
    if found:
        raise ValueError(
            f"{found[0]}{f', and {len(found) - 1} more blocks' if found[1:] else ''}; copy the file again, or remove "
            "the store's files and save it again"
        )
    counts = count_keys(store.keys)
    if counts.nonfinite:
        raise ValueError(
            f"{counts.nonfinite} keys of datastore {config.prefix!r} hold NaN or infinity; {PROGRAM} convert "
            "--drop-nonfinite leaves them out"
        )
    checked = "every block is as it was saved" if store.shards else "without checksums (files of another program)"
    return (
        f"datastore, {len(store)} rows in {max(1, len(store.shards))} parts, {store.keys.nbytes + store.values.nbytes} "
        f"bytes: {checked}; {counts.nonfinite} keys hold NaN or infinity, {counts.zero} are all zeros"
    )


def convert(config: ConvertConfig, argv: Sequence[str]) -> None:
    """Write a copy of the store and print how many rows it has."""
    from fairseq.data.dictionary import Dictionary
    from fairseq.memory.datastore.convert import convert as write

    store = _open(config)
    metadata: dict[str, Any] = {"key_tap": config.knn_keytype} if config.knn_keytype else {}
    if config.dictionary:
        dictionary = Dictionary.load(config.dictionary)
        metadata |= {"dictionary_digest": dictionary.digest(), "dictionary_size": len(dictionary)}
        store.require(dictionary_digest=dictionary.digest(), dictionary_size=len(dictionary))
    store.require(key_tap=config.knn_keytype)
    done = write(store, config.out, config.dtype or store.keys.dtype, metadata, drop=config.drop_nonfinite)
    sys.stdout.write(
        f"wrote {done.rows} rows to {config.out}; dropped {done.dropped}, of which {done.nonfinite} held NaN or "
        "infinity\n"
    )
    _write_manifest(config.out, config, argv, {"rows": done.rows, "left_out": done.dropped})


def sample(config: SampleConfig, argv: Sequence[str]) -> None:
    """Write the sample and print how many rows it has."""
    from fairseq.memory.datastore.convert import sample as write

    done = write(_open(config), config.out, config.rows, config.seed)
    sys.stdout.write(f"wrote {done.rows} of {done.rows + done.dropped} rows to {config.out}\n")
    _write_manifest(config.out, config, argv, {"rows": done.rows, "left_out": done.dropped})


def quantize(config: QuantizeConfig, argv: Sequence[str]) -> None:
    """Train a codec, write the codes of all keys, and print the error of what they stand for."""
    import os
    import time

    from tqdm import tqdm

    from fairseq.memory.gnn.features import quantize_store
    from fairseq.runtime.atomic_files import require_writable
    from fairseq.runtime.manifest import require_own_manifest, write_manifest

    for name, path in (("out", config.out), ("--codec-file", config.codec_path)):
        require_writable(os.path.dirname(os.path.abspath(path)), name)
    manifest = f"{config.out}.run.json"
    require_own_manifest(manifest, f"{PROGRAM} quantize", "name of the codes")
    started, store = time.perf_counter(), _open(config)
    with tqdm(unit=" keys", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = quantize_store(config, store, report)
    codec, seconds = done.features.codec, time.perf_counter() - started
    sys.stdout.write(
        f"{config.out}: {len(store)} codes of {codec.num_bytes} bytes by {config.codec_path} ({seconds:.1f}s), trained "
        f"on {done.num_sampled} keys; mean relative squared error of {done.num_held_out} other keys: {done.error:.4f}\n"
    )
    figures = {"num_codes": len(store), "code_bytes": codec.num_bytes, "relative_error": done.error}
    figures |= {"num_sampled": done.num_sampled, "num_held_out": done.num_held_out, "seconds": seconds}
    write_manifest(manifest, program=PROGRAM, argv=argv, config=to_dict(config), figures=figures, inputs=())


def export_targets(config: ExportTargetsConfig, argv: Sequence[str]) -> None:
    """Write the neighbours' distributions, and print how large they are."""
    import os

    from tqdm import tqdm

    from fairseq.memory.retrieval.explain import open_store
    from fairseq.memory.retrieval.file import Retrieval
    from fairseq.memory.retrieval.soft_targets import export
    from fairseq.runtime.atomic_files import require_writable
    from fairseq.runtime.manifest import require_own_manifest, write_manifest

    require_writable(os.path.dirname(os.path.abspath(config.out)), "--out")
    manifest = f"{config.out}.run.json"
    require_own_manifest(manifest, f"{PROGRAM} export-knn-targets", "--out")
    retrieval = Retrieval.open(config.retrieval)
    if retrieval.is_joint:
        raise ValueError(
            f"{config.retrieval} is of eval_lm-trime.py, whose neighbours are normalised with the vocabulary; give a "
            "retrieval of eval_lm.py --knnlm"
        )
    k = config.num_neighbors or retrieval.k
    if k > retrieval.k:
        raise ValueError(f"--k {k} is more than the {retrieval.k} neighbours in {config.retrieval}; give at most these")
    store = open_store(retrieval, config.dstore_filename)
    temperature = config.temperature or float(retrieval.about["temperature"])
    with tqdm(total=len(retrieval), unit=" tokens", disable=None) as bar:
        figures = export(
            retrieval, store.values, config.out, k=k, temperature=temperature, report=lambda n: bar.update(n - bar.n)
        )
    own = "without its own row" if figures["own_rows_dropped"] else "of a store of another text"
    mean = figures["num_entries"] / max(1, figures["num_tokens"])
    sys.stdout.write(
        f"{config.out}: {figures['num_tokens']} tokens, {mean:.1f} entries each, {own}, {figures['bytes']} bytes\n"
    )
    write_manifest(
        manifest, program=PROGRAM, argv=argv, config=to_dict(config), figures=figures, inputs=[config.retrieval]
    )


def merge(config: MergeConfig, argv: Sequence[str]) -> None:
    """Make the whole and print how many rows it has."""
    from fairseq.memory.datastore.merge import merge as join

    metadata = join(config.prefix, config.stores)
    sys.stdout.write(f"{config.prefix}: {metadata['rows']} rows in {len(metadata['parts'])} parts\n")
    _write_manifest(config.prefix, config, argv, {"rows": metadata["rows"], "parts": len(metadata["parts"])})


def delete(config: DeleteConfig, argv: Sequence[str]) -> None:
    """Delete, rewrite if asked to, and print how many rows are left."""
    import numpy as np

    from fairseq.memory.datastore.delete import compact, compacted_by, request_digest
    from fairseq.memory.datastore.delete import delete as mark

    ranges = [np.arange(first, last + 1) for first, last in config.rows]
    if config.rows_file:
        ranges.append(_rows_in(config.rows_file))
    rows = np.concatenate(ranges) if ranges else None
    asked = rows is not None or bool(config.documents)
    request = request_digest(rows, config.documents) if asked else ""
    if config.compact and asked:
        store = compacted_by(config.prefix, request, config.generation)
        if store is not None:
            present = store.metadata["generation"]
            sys.stdout.write(
                f"{config.prefix} is without these rows already ({len(store)} rows, generation {present}); to delete "
                f"rows with the same numbers in the rewritten store, add --generation {present}\n"
            )
            return
    if asked:
        done = mark(config.prefix, rows, config.documents, config.generation)
        sys.stdout.write(
            f"deleted {done.new} rows of {config.prefix}; {done.total} of its {done.rows} rows are deleted now\n"
        )
    if config.compact:
        left = compact(config.prefix, request)
        sys.stdout.write(f"rewrote {config.prefix}: {left.rows} rows; {left.dropped} deleted ones are gone\n")


def plan(config: PlanConfig, argv: Sequence[str]) -> None:
    """Measure this machine and print what everything would take."""
    from fairseq.memory.planning.table import table
    from fairseq.runtime.atomic_files import require_writable

    require_writable(config.folder, "--folder")

    from fairseq.memory.planning.estimate import plan as make
    from fairseq.memory.planning.gnn_estimate import gnn_plan
    from fairseq.memory.planning.gnn_measure import measure_with_gnn
    from fairseq.memory.planning.gnn_table import gnn_table
    from fairseq.memory.planning.measure import measure
    from fairseq.runtime.hardware import total_ram_bytes

    rates, gnn_rates = measure_with_gnn(config) if config.gnn_k else (measure(config), None)
    made = make(config, rates, total_ram_bytes())
    gnn = gnn_plan(config, gnn_rates, total_ram_bytes()) if gnn_rates else None
    if config.json:
        figures = {"config": to_dict(config), "rates": to_dict(rates), "store_bytes": made.store_bytes}
        figures |= {"store_write_seconds": made.write_seconds, "choices": [c.to_dict() for c in made.choices]}
        if gnn and gnn_rates:
            figures |= {"gnn_rates": to_dict(gnn_rates), "gnn": gnn.to_dict()}
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    sys.stdout.write(table(config, rates, made, total_ram_bytes()))
    if gnn:
        sys.stdout.write(gnn_table(config, gnn))


def doctor(config: DoctorConfig, argv: Sequence[str]) -> None:
    """Print what this machine has; with --warm compile the kernels, and print how many are compiled instead."""
    import time
    from pathlib import Path

    from fairseq.memory.kernel_warmup import status, warm

    if not config.warm:
        from fairseq.memory.planning.doctor import report
        from fairseq.runtime.atomic_files import require_writable

        require_writable(config.folder, "--folder")
        for line in report(Path(config.folder)):
            _print_line(line)
    start = time.perf_counter()
    now = warm(_print_line) if config.warm else status()
    where = f"{now.compiled} of {now.total} are compiled, in {now.folder}"
    if config.warm:
        _print_line(f"kernels: {where}; it took {time.perf_counter() - start:.1f}s")
    elif now.compiled == now.total:
        _print_line(f"kernels: {where}")
    elif now.obstacle:
        _print_line(f"kernels: every process compiles them: {now.obstacle}; set NUMBA_CACHE_DIR to a folder for them")
    else:
        _print_line(f"kernels: {where}; {PROGRAM} doctor --warm compiles the others")


def serve(config: ServeConfig, argv: Sequence[str]) -> None:
    """Print what is served and where, and serve it until SIGINT or SIGTERM."""
    from fairseq.memory.index.sharded.opening import serve as start
    from fairseq.memory.index.sharded.ranges import SearchSettings
    from fairseq.memory.types import Metric

    metric, memory_bytes = Metric.parse(config.faiss_metric_type), int(config.search_memory * 1e9)
    settings = SearchSettings(metric, config.probe, config.index_mmap, not config.use_faiss_cpu, memory_bytes)
    index, actors, address = start(_open(config), config.search_on, settings, config.indexfile, config.workers)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    _print_line(f"serving {index}: --search-on ray://{address}")
    while not ended.wait(1.0):
        pass
    actors.end()
    _print_line(f"ended {config.prefix}")


def run_shards(config: RunShardsConfig, argv: Sequence[str]) -> None:
    """Run all shards, print what each printed, and raise what one of them failed of."""
    from fairseq.runtime.ray_cluster import connect, run_commands

    _, words = split_command(argv)
    if not words:
        raise ValueError("no command to run; write run-shards N -- eval_lm.py ... (or build_dstore.py ...)")
    program = (sys.executable,) if words[0].endswith(".py") else ()
    commands = [[*program, *config.command(tuple(words), shard)] for shard in range(config.num_shards)]
    connect(config.run_on)
    failed = []
    for done in run_commands(commands, cpus=config.cpus, gpus=config.gpus, attempts=config.attempts):
        state = f"failed with status {done.code}" if done.code else "done"
        _print_line(f"shard {done.number} of {config.num_shards} {state} on {done.node}")
        sys.stdout.write(done.out)
        failed += [done] if done.code else []
    if failed:
        shards = ", ".join(str(done.number) for done in failed)
        raise ValueError(
            f"{len(failed)} of {config.num_shards} shards failed ({shards}), the first with status {failed[0].code}: "
            f"{failed[0].error}; run the same command again to resume"
        )


def _print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _rows_in(path: str) -> Any:
    import numpy as np

    with open(path, encoding="utf-8") as file:
        words = file.read().split()
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"--rows-file {path}: {wrong!r} is no row; give whole numbers separated by white space")
    return np.array(words, dtype=np.int64)


def _write_manifest(prefix: str, config: Any, argv: Sequence[str], figures: dict[str, Any]) -> None:
    from fairseq.memory.datastore.layout import side_file
    from fairseq.runtime.manifest import write_manifest

    path = side_file(prefix, "run.json")
    write_manifest(path, program=PROGRAM, argv=argv, config=to_dict(config), figures=figures, inputs=())


# A command: its config, whose docstring is its help, and the function called with it and the arguments.
COMMANDS = {
    "info": Entry(InfoConfig, info),
    "verify": Entry(VerifyConfig, verify),
    "convert": Entry(ConvertConfig, convert),
    "merge": Entry(MergeConfig, merge),
    "delete": Entry(DeleteConfig, delete),
    "sample": Entry(SampleConfig, sample),
    "quantize": Entry(QuantizeConfig, quantize),
    "export-knn-targets": Entry(ExportTargetsConfig, export_targets),
    "plan": Entry(PlanConfig, plan),
    "doctor": Entry(DoctorConfig, doctor),
    "serve": Entry(ServeConfig, serve),
    "run-shards": Entry(RunShardsConfig, run_shards),
}


def split_command(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The words for this program, and those after ``--``: the command that run-shards runs."""
    at = words.index(_COMMAND) if _COMMAND in words else len(words)
    return words[:at], words[at + 1 :]


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {command.config.__doc__}" for name, command in COMMANDS.items()]
        sys.stdout.write("\n".join([f"usage: {PROGRAM} COMMAND PREFIX ... (COMMAND --help for options)", *lines, ""]))
        return
    name, *words = argv
    command = lookup(COMMANDS, name, "command")
    parser = FlagParser(f"{PROGRAM} {name}", command.config.__doc__ or "")
    parser.add_config(command.config)
    command.load()(build(command.config, parser.parse(split_command(words)[0])), argv)


def cli_main() -> None:
    """Entry point of fairseq-datastore."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
