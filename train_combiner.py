#!/usr/bin/env python3
"""Train how much the neighbours of a datastore count: see --help."""

from fairseq_cli.memory.train_combiner import cli_main

if __name__ == "__main__":
    cli_main()
