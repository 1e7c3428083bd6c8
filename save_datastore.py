#!/usr/bin/env python3
"""Write the datastore of a translation model: see --help."""

from fairseq_cli.save_datastore import cli_main

if __name__ == "__main__":
    cli_main()
