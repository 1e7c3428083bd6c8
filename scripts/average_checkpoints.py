#!/usr/bin/env python3
"""Average the weights of several checkpoints: see --help."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from fairseq_cli.average_checkpoints import cli_main

if __name__ == "__main__":
    cli_main()
