"""Serve a Hugging Face model with its memories in OpenAI's form: fairseq-serve MODEL --store NAME=PREFIX ..."""

from __future__ import annotations

from collections.abc import Sequence

from fairseq.config import FlagParser, build
from fairseq.serving.config import ModelServerConfig
from fairseq_cli.entry import run

PROGRAM = "fairseq-serve"


def main(argv: Sequence[str]) -> None:
    """Open the model and its stores, and answer until interrupted."""
    parser = FlagParser(PROGRAM, ModelServerConfig.__doc__ or "")
    parser.add_config(ModelServerConfig)
    config = build(ModelServerConfig, parser.parse(argv))

    from fairseq.web.running import Address
    from fairseq.web.running import run as answer

    with Address(config) as address:  # before the model: a port in use is found at once
        from fairseq.serving.app import OPEN_PATHS
        from fairseq.serving.opening import open_server

        with open_server(config) as server:
            answer(server.app(), address, open_paths=OPEN_PATHS, grace_seconds=config.grace_seconds)


def cli_main() -> None:
    """Entry point of fairseq-serve."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
