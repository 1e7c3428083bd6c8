#!/usr/bin/env bash
# The transformer on IWSLT 2014 German to English that kNN-MT's datastore is made with: label-smoothed cross-entropy.
# Settings from the environment and words for train.py: see common.sh. BLEU and evaluation: README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data-bin/iwslt14.tokenized.de-en}
share 16384 4096 1
translate --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "$@"
