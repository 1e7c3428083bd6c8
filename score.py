#!/usr/bin/env python3
"""Score a translation: see --help."""

from fairseq_cli.score import cli_main

if __name__ == "__main__":
    cli_main()
