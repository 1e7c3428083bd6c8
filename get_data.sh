#!/usr/bin/env bash
# Download a corpus, check it and binarise it; or a small language model for Hugging Face's from_pretrained:
#   bash get_data.sh {wikitext-103 | enwik8 | shakespeare} [FOLDER] [--download-dir D] [--text-dir D] [--text-only] [--workers N]
#   bash get_data.sh {multi30k | iwslt14} [FOLDER] [the same]       (pairs of sentences, German and English)
#   bash get_data.sh smollm2 [FOLDER] [--download-dir D]
# FOLDER is data-bin/NAME (data-bin/NAME.de-en for pairs), or models/smollm2, unless given. An interrupted download goes on
# where it stopped. DATA_MIRROR=ADDRESS (or a folder) is where files are taken from instead of the usual place; PYTHON
# names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ]; then
  sed -n 's/^#   //p' "$root/get_data.sh" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$(command -v python || command -v python3)
  [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m fairseq_cli.data.get_data "$@"
