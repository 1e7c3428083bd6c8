#!/usr/bin/env python3
"""Score text with a language model, with or without a datastore: see --help."""

from fairseq_cli.eval_lm import cli_main

if __name__ == "__main__":
    cli_main()
