#!/usr/bin/env bash
# Put the text of WikiText-103 into examples/language_model/wikitext-103 (wiki.train.tokens, wiki.valid.tokens,
# wiki.test.tokens), from where the README's preprocess.py command reads it. May be started from any folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
exec bash "$root/get_data.sh" wikitext-103 --text-only --text-dir "$here/wikitext-103" --download-dir "$root/downloads"
