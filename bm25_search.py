#!/usr/bin/env python3
"""Find the segments most like each segment; see ``python bm25_search.py --help``."""

from fairseq_cli.data.bm25_search import cli_main

if __name__ == "__main__":
    cli_main()
