#!/usr/bin/env python3
"""Line up segments so that neighbours are alike; see ``python bm25_make_batches.py --help``."""

from fairseq_cli.data.bm25_make_batches import cli_main

if __name__ == "__main__":
    cli_main()
