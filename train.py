#!/usr/bin/env python3
"""Train a language model: see --help."""

from fairseq_cli.train import cli_main

if __name__ == "__main__":
    cli_main()
