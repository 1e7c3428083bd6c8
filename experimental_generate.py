#!/usr/bin/env python3
"""Translate with a datastore, as TRIME's program is called: see --help."""

from fairseq_cli.generate import cli_main

if __name__ == "__main__":
    cli_main()
