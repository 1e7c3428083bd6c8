#!/usr/bin/env python3
"""Build a faiss index over a datastore; see ``python build_dstore.py --help``."""

from fairseq_cli.build_dstore import cli_main

if __name__ == "__main__":
    cli_main()
