#!/usr/bin/env bash
# TrimeLM, 38M parameters, segments of 512 characters: each segment is its own memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/enwik8}
share 24576 24576 512
train "${enwik8_38M[@]}" --criterion trime_loss "$@"
