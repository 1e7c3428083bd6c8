#!/usr/bin/env python3
"""Translate or continue typed lines: see --help."""

from fairseq_cli.interactive import cli_main

if __name__ == "__main__":
    cli_main()
