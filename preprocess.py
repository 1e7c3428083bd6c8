#!/usr/bin/env python3
"""Turn text into dictionaries and binarised data: see --help."""

from fairseq_cli.preprocess import cli_main

if __name__ == "__main__":
    cli_main()
