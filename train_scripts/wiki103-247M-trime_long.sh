#!/usr/bin/env bash
# TrimeLM_long, 247M: four consecutive segments of 3,072 tokens share their memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/wikitext-103}
# The memory spans four devices with a segment each; fewer devices hold more segments each (and need that much memory).
share 73728 $((12288 / (devices < 4 ? devices : 4))) 3072
memory=$((tokens * (devices < 4 ? devices : 4)))
train "${wiki103_247M[@]}" --criterion trime_long_loss --keep-order --train-mem-size "$memory" "$@"
