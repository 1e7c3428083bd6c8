#!/usr/bin/env python3
"""Translate or continue text: see --help."""

from fairseq_cli.generate import cli_main

if __name__ == "__main__":
    cli_main()
