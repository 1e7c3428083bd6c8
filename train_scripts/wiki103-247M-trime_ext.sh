#!/usr/bin/env bash
# TrimeLM_ext, 247M: batches of segments that BM25 finds alike are each other's memory (arXiv 2205.12674).
# Settings from the environment and words for train.py: see common.sh. Perplexities, hardware and time: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/wikitext-103}
share 73728 3072 3072
# Made by bm25_search.py and bm25_make_batches.py: README.md has the commands.
batches=${BATCHES:-$DATA/wiki103-l3072-batches.json}
train "${wiki103_247M[@]}" --criterion trime_ext_loss --ce-warmup-epoch 9 --cross-sent-ratio 0.9 \
  --predefined-batches "$batches" "$@"
