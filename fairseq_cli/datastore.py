"""Look after datastores: fairseq-datastore COMMAND PREFIX ..."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.datastore.config import (
    ConvertConfig,
    DeleteConfig,
    DoctorConfig,
    InfoConfig,
    MergeConfig,
    SampleConfig,
    StoreConfig,
    VerifyConfig,
)
from fairseq.memory.planning.config import PlanConfig
from fairseq.registry import Entry, lookup
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

PROGRAM = "fairseq-datastore"


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
    """Print what is damaged, or that nothing is; every path is looked at before the first damage is raised."""
    first: Exception | None = None
    for path in config.paths:
        try:
            _verify_path(config, path)
        except (ValueError, OSError) as error:
            if len(config.paths) > 1:
                sys.stdout.write(f"{path}: {' '.join(str(error).split())}\n")
            first = first or error
    if first is not None:
        raise first


def _verify_path(config: VerifyConfig, path: str) -> None:
    """Print a line for each thing that a path names. Raises: ValueError for damage."""
    from fairseq.verification.kinds import recognised
    from fairseq.verification.kinds import verify as outcome

    kinds = recognised(Path(path))
    if not kinds:
        # Arrays of another program; for anything else the message of a store says what is missing.
        if Path(path).is_file():
            raise ValueError(f"{path!r} is no file of this toolkit, or damaged beyond recognition; name another")
        _verify_store(replace(config, prefix=path))
    for kind, name in kinds:
        if kind == "datastore":
            _verify_store(replace(config, prefix=str(name)))
        else:
            sys.stdout.write(f"{path}: {kind}, {outcome(kind, name)}\n")


def _verify_store(config: StoreConfig) -> None:
    from fairseq.memory.datastore.info import count_keys
    from fairseq.memory.datastore.verify import damage
    from fairseq.verification.kinds import require_sealed_store

    store = _open(config)
    found = list(damage(store.shards))
    for line in found:
        sys.stdout.write(line + "\n")
    counts = count_keys(store.keys)
    checked = "every block is as it was saved" if store.shards else "without checksums (files of another program)"
    if found:
        checked = f"{len(found)} damaged blocks"
    sys.stdout.write(
        f"{len(store)} rows in {max(1, len(store.shards))} parts, {store.keys.nbytes + store.values.nbytes} bytes: "
        f"{checked}; {counts.nonfinite} keys hold NaN or infinity, {counts.zero} are all zeros\n"
    )
    if found:
        raise ValueError(f"{found[0]}; copy the file again, or remove the store's JSON file and save it again")
    require_sealed_store(store)
    if counts.nonfinite:
        raise ValueError(
            f"{counts.nonfinite} keys of datastore {config.prefix!r} hold NaN or infinity; {PROGRAM} convert "
            "--drop-nonfinite leaves them out"
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
    from fairseq.memory.planning.measure import measure
    from fairseq.runtime.hardware import total_ram_bytes

    rates = measure(config)
    made = make(config, rates, total_ram_bytes())
    if config.json:
        figures = {"config": to_dict(config), "rates": to_dict(rates), "store_bytes": made.store_bytes}
        figures |= {"store_write_seconds": made.write_seconds, "choices": [c.to_dict() for c in made.choices]}
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    sys.stdout.write(table(config, rates, made, total_ram_bytes()))


def doctor(config: DoctorConfig, argv: Sequence[str]) -> None:
    """Compile the kernels if asked to, and print how many are compiled and where they are."""
    import time

    from fairseq.memory.kernel_warmup import status, warm

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
    from fairseq.runtime.manifest import write_manifest

    write_manifest(f"{prefix}.run.json", program=PROGRAM, argv=argv, config=to_dict(config), figures=figures, inputs=())


# A command: its config, whose docstring is its help, and the function called with it and the arguments.
COMMANDS = {
    "info": Entry(InfoConfig, info),
    "verify": Entry(VerifyConfig, verify),
    "convert": Entry(ConvertConfig, convert),
    "merge": Entry(MergeConfig, merge),
    "delete": Entry(DeleteConfig, delete),
    "sample": Entry(SampleConfig, sample),
    "plan": Entry(PlanConfig, plan),
    "doctor": Entry(DoctorConfig, doctor),
}


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8} {command.config.__doc__}" for name, command in COMMANDS.items()]
        sys.stdout.write("\n".join([f"usage: {PROGRAM} COMMAND PREFIX ... (COMMAND --help for options)", *lines, ""]))
        return
    name, *words = argv
    command = lookup(COMMANDS, name, "command")
    parser = FlagParser(f"{PROGRAM} {name}", command.config.__doc__ or "")
    parser.add_config(command.config)
    command.load()(build(command.config, parser.parse(words)), argv)


def cli_main() -> None:
    """Entry point of fairseq-datastore."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
