"""Show what a memory does to each token of a text, on one page: fairseq-explore KIND ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build
from fairseq.explorer.config import (
    ExploreConfig,
    HfMemoryConfig,
    HfTextConfig,
    MindConfig,
    SavedConfig,
    TranslationConfig,
)
from fairseq.registry import lookup
from fairseq.web.config import AddressConfig
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.explorer.live import Opened

PROGRAM = "fairseq-explore"
_OURS = (AddressConfig, ExploreConfig)
"""Options that every kind has besides its own."""

Parsed = tuple[dict[str, Any], "Callable[[], Opened]"]


def saved(argv: Sequence[str]) -> Parsed:
    """Files of --save-retrieval, without any model."""
    given = _parse("saved", (SavedConfig,), argv)
    config = build(SavedConfig, given)

    def open_() -> Opened:
        from fairseq.explorer.kinds.saved import open_saved
        from fairseq.explorer.live import Opened

        return Opened(open_saved(config.retrievals, config.dictionary, config.dstore_filename))

    return given, open_


def eval_lm(argv: Sequence[str]) -> Parsed:
    """What eval_lm.py evaluates (kNN-LM, RetoMaton), with its arguments."""
    return _evaluation(argv, "eval_lm.py")


def eval_lm_trime(argv: Sequence[str]) -> Parsed:
    """What eval_lm-trime.py evaluates (TRIME), with its arguments."""
    return _evaluation(argv, "eval_lm-trime.py")


def _evaluation(argv: Sequence[str], program: str) -> Parsed:
    from fairseq.evaluation.memories import check_knn, check_trime
    from fairseq.options import evaluation_configs, parse_eval_lm

    settings = parse_eval_lm(argv, program, _OURS)
    configs = evaluation_configs(settings)
    (check_knn if configs.trime is None else check_trime)(configs)

    def open_() -> Opened:
        from fairseq.explorer.kinds.lm import open_lm

        return open_lm(configs)

    return dict(settings.given), open_


def generate(argv: Sequence[str]) -> Parsed:
    """What generate.py translates (kNN-MT, SK-MT), with its arguments."""
    from fairseq.runtime.manifest import Command
    from fairseq.tasks import TASKS
    from fairseq_cli.generate import configs_of, open_wording, parsed

    given, name = parsed(argv, "generate.py", (*_OURS, TranslationConfig))
    if name != "translation":
        raise ValueError(f"--task {name}: generate explores translations; fairseq-explore eval-lm explores other text")
    configs = configs_of(Command("generate.py", tuple(argv), given), given, name)
    if configs.proof.prove:
        raise ValueError("--prove is for generate.py; leave it out: translations are shown, not proven")
    num_sentences = build(TranslationConfig, given).sentences

    def open_() -> Opened:
        from fairseq.explorer.kinds.translation import TranslationSettings, open_translation

        task: Any = TASKS[name].load()(configs.task)
        settings = TranslationSettings(
            generate=configs.generate,
            generation=configs.generation,
            memory=configs.memory,
            runtime=configs.runtime,
            overrides=configs.overrides,
            num_sentences=num_sentences,
        )
        return open_translation(settings, task, open_wording(configs, task))

    return given, open_


def hf(argv: Sequence[str]) -> Parsed:
    """A transformers model with a datastore (kNN-LM, RetoMaton)."""
    given = _parse("hf", (HfTextConfig, HfMemoryConfig), argv)
    text, memory = build(HfTextConfig, given), build(HfMemoryConfig, given)

    def open_() -> Opened:
        from fairseq.explorer.kinds.hf import open_hf

        return open_hf(text, memory)

    return given, open_


def extended_mind(argv: Sequence[str]) -> Parsed:
    """A transformers model with memories inside attention (Extended Mind)."""
    given = _parse("extended-mind", (HfTextConfig, MindConfig), argv)
    text, memory = build(HfTextConfig, given), build(MindConfig, given)

    def open_() -> Opened:
        from fairseq.explorer.kinds.mind import open_mind

        return open_mind(text, memory)

    return given, open_


KINDS: dict[str, Callable[[Sequence[str]], Parsed]] = {
    "saved": saved,
    "eval-lm": eval_lm,
    "eval-lm-trime": eval_lm_trime,
    "generate": generate,
    "hf": hf,
    "extended-mind": extended_mind,
}


def main(argv: Sequence[str]) -> None:
    """Open what is explored, and answer requests until the program is stopped; or write the file of --export."""
    if not argv or argv[0] in ("-h", "--help"):
        _print_kinds()
        return
    # A file alone is a saved one: the shortest command is the most frequent one.
    kind, words = ("saved", argv) if os.path.isfile(argv[0]) else (argv[0], argv[1:])
    if kind not in KINDS and os.sep in kind:
        raise ValueError(f"no file {kind!r}; name one of --save-retrieval, or a kind: {', '.join(KINDS)}")
    given, open_ = lookup(KINDS, kind, "kind of exploration")(words)
    explore, place = build(ExploreConfig, given), build(AddressConfig, given)
    if explore.export is not None:
        write_export(open_, explore)
        return
    serve(open_, place)


def serve(open_: Callable[[], Opened], place: AddressConfig) -> None:
    """Answer requests. The address is taken first: a port in use is found before a model is loaded."""
    from fairseq.web.running import Address
    from fairseq.web.running import run as run_server

    with Address(place) as address:
        app = _app()
        with open_() as opened:
            run_server(app(opened.explanation), address)


def _app() -> Any:
    try:
        from fairseq.explorer.app import make_app
    except ModuleNotFoundError as error:
        if error.name != "starlette":
            raise
        raise ValueError("starlette is not installed; pip install 'fairseq-memory[explore]'") from error
    return make_app


def write_export(open_: Callable[[], Opened], config: ExploreConfig) -> None:
    """Score everything and write the explanation of a part as one file."""
    from fairseq.explorer.export import as_html, export, read_page
    from fairseq.runtime.atomic_files import require_writable, write_atomically

    path = str(config.export)
    require_writable(os.path.dirname(os.path.abspath(path)), "--export")
    with open_() as opened:
        opened.finish()
        count, first = len(opened.explanation.table), config.export_first
        if first >= count:
            raise ValueError(f"--export-first {first}: the text has {count} tokens; give a smaller number")
        rows = slice(first, min(first + config.export_tokens, count))
        content = export(opened.explanation, rows)
    write_atomically(path, as_html(read_page(), content) if path.endswith(".html") else content)
    sys.stdout.write(f"wrote tokens {rows.start} to {rows.stop - 1} of {count} to {path}\n")


def _parse(kind: str, configs: Sequence[type], argv: Sequence[str]) -> dict[str, Any]:
    parser = FlagParser(f"{PROGRAM} {kind}", configs[-1].__doc__ or "")
    for each in (*configs, *_OURS):
        parser.add_config(each)
    return parser.parse(argv)


def _print_kinds() -> None:
    sys.stdout.write(f"usage: {PROGRAM} KIND ..., where KIND is one of\n")
    for name, kind in KINDS.items():
        sys.stdout.write(f"  {name:<15} {(kind.__doc__ or '').strip()}\n")
    sys.stdout.write(f"{PROGRAM} KIND --help lists the options of a kind\n")


def cli_main() -> None:
    """Entry point of fairseq-explore."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
