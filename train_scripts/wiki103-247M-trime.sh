#!/usr/bin/env bash
# TrimeLM, 247M parameters, segments of 3,072 tokens: each segment is its own memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/wikitext-103}
share 73728 3072 3072
train "${wiki103_247M[@]}" --criterion trime_loss "$@"
