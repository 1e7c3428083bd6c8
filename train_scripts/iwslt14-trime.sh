#!/usr/bin/env bash
# TrimeMT on IWSLT 2014 German to English: target sentences of a batch that BM25 finds alike are each other's memory
# (arXiv 2205.12674). Settings from the environment and words for train.py: see common.sh. BM25 batches: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/iwslt14.tokenized.de-en}
share 16384 4096 1
batches=${BATCHES:-$DATA/bm25_batches.json}
translate --criterion trime_mt_loss --ce-warmup-epoch 5 --dist-func ip --temp 10.0 --topk-mem 8 \
  --predefined-batches "$batches" "$@"
