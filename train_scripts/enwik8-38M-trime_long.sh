#!/usr/bin/env bash
# TrimeLM_long, 38M: 48 consecutive segments of 512 characters share their memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/enwik8}
share 24576 24576 512
# One device holds all segments of a batch; several share them and send each other their memories.
long=(--criterion trime_long_loss_same_device --keep-order)
[ "$tokens" -eq 24576 ] || long=(--criterion trime_long_loss --keep-order --train-mem-size $((tokens * devices)))
train "${enwik8_38M[@]}" "${long[@]}" "$@"
