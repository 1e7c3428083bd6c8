#!/usr/bin/env python3
"""Build an index over a datastore, as TRIME's program for translation is called: see --help."""

from fairseq_cli.build_dstore import cli_main

if __name__ == "__main__":
    cli_main()
