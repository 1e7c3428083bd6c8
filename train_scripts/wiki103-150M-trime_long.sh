#!/usr/bin/env bash
# TrimeLM_long, 150M: 96 consecutive segments of 150 tokens share their memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/wikitext-103}
share 14400 14400 150
# One device holds all segments of a batch; several share them and send each other their memories.
long=(--criterion trime_long_loss_same_device --keep-order)
[ "$tokens" -eq 14400 ] || long=(--criterion trime_long_loss --keep-order --train-mem-size $((tokens * devices)))
train "${wiki103_150M[@]}" "${long[@]}" "$@"
