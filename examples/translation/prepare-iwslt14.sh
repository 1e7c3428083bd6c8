#!/usr/bin/env bash
# IWSLT 2014 German to English, as fairseq's recipe prepares it: words by Moses, training pairs of at most 175 words and
# length ratio 1.5, lower case, every 23rd pair as valid, five talks' sets as test, 10,000 joint BPE merges. The text goes
# to examples/translation/iwslt14.tokenized.de-en (with the merges, "code"), from where fairseq's README reads it.
#   DATA_MIRROR=/a/folder/with/de-en.tgz bash examples/translation/prepare-iwslt14.sh
# May be started from any folder; without DATA_MIRROR the archive is downloaded.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
exec bash "$root/get_data.sh" iwslt14 --text-only --text-dir "$here/iwslt14.tokenized.de-en" \
  --download-dir "$root/downloads"
