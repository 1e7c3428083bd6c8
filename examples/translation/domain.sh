#!/usr/bin/env bash
# kNN-MT's own experiment, another domain without training (arXiv 2010.00710, sec. 4.3), at a small size: the plain model of
# run.sh, which has read captions only, translates LibreOffice's interface with a datastore of other strings of it.
#   bash examples/translation/run.sh FOLDER && bash examples/translation/domain.sh FOLDER [PACKAGE]
# PACKAGE is Debian's libreoffice-l10n-de (a .deb, or a folder of .mo files); without it apt-get downloads one.
# Started again, it skips what is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
base=${1:-output/translation} package=${2:-}
out=$base/libreoffice
model=$base/plain/checkpoint_best.pt
text=downloads/multi30k.de-en data=$out/data-bin
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ ! -e "$model" ]; then
  echo "domain.sh: no model at $model; run examples/translation/run.sh $base first" >&2
  exit 2
fi
mkdir -p "$out"
source examples/translation/stages.sh

if [ -z "$package" ] && [ ! -e "$out/text/test.en" ]; then
  [ -n "$(ls "$out"/libreoffice-l10n-de_*.deb 2>/dev/null)" ] || (cd "$out" && apt-get download libreoffice-l10n-de)
  package=$(ls "$out"/libreoffice-l10n-de_*.deb)
fi
stage text "$out/text/test.en" python examples/translation/libreoffice.py "$out/text" --messages "$package" \
  --codes $text/code
stage data "$data/test.de-en.en.idx" python preprocess.py --source-lang de --target-lang en --trainpref "$out/text/train" \
  --validpref "$out/text/valid" --testpref "$out/text/test" --destdir "$data" --workers 2 \
  --srcdict data-bin/multi30k.de-en/dict.de.txt --tgtdict data-bin/multi30k.de-en/dict.en.txt
store interface "$data" "$model" "$out/store" l2

neighbors=(--knnmt --dstore-filename "$out/store" --indexfile "$out/store/knn_index" --probe 16 --k 8)
for temperature in 10 50; do
  for share in 0.5 0.7 0.9; do
    translate "knn-temp$temperature-share$share" "$data" "$model" valid "${neighbors[@]}" --knn-temp $temperature --lmbda $share
  done
done
chosen=$(python examples/translation/report.py "$out" --chosen temp,share)
temperature=${chosen% *} share=${chosen#* }
translate plain "$data" "$model" test
translate knn "$data" "$model" test "${neighbors[@]}" --knn-temp "$temperature" --lmbda "$share"
stage combiner "$out/combiner-adaptive.run.json" python train_combiner.py "$data" --cpu --max-tokens 4096 --path "$model" \
  --dstore-filename "$out/store" --indexfile "$out/store/knn_index" --probe 16 --k 8 --knn-temp "$temperature" \
  --kind adaptive --out "$out/combiner-adaptive.safetensors"
translate adaptive "$data" "$model" test "${neighbors[@]}" --knn-temp "$temperature" --knn-lambda-type adaptive \
  --combiner "$out/combiner-adaptive.safetensors"
python examples/translation/report.py --domain "$out"
