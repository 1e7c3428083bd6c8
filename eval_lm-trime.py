#!/usr/bin/env python3
"""Score text with a language model and TRIME's memories: see --help."""

from fairseq_cli.eval_lm_trime import cli_main

if __name__ == "__main__":
    cli_main()
