#!/usr/bin/env bash
# From nothing to a table, on Shakespeare's plays: a small language model, alone and with a datastore of its own training
# text (kNN-LM, arXiv 1911.00172), and models that are trained with memory (TRIME, arXiv 2205.12674). Two CPU cores, a
# few minutes. Started again, it skips what is done and goes on with what was interrupted; remove demo/ to start afresh.
#   bash train_scripts/shakespeare-demo.sh [FOLDER]     (default: demo)
#   UPDATES=300 SEED=2 VARIANTS="plain local" bash train_scripts/shakespeare-demo.sh ...
# VARIANTS names the models, all trained for as many updates: plain, and TRIME's local, long and external.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-demo}
data=data-bin/shakespeare
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING} UPDATES=${UPDATES:-250} VARIANTS=${VARIANTS:-plain local long external}
mkdir -p "$out"
source train_scripts/stages.sh

# The models, and TRIME's evaluations: the same script as the example's.
bash examples/trime/run.sh "$out"

model=(--path "$out/plain/checkpoint_best.pt" --cpu --knn-keytype last_ffn_input)
stage knn-store "$out/plain/dstore.run.json" python eval_lm.py $data "${model[@]}" --gen-subset train \
  --sample-break-mode none --context-window 16 --max-tokens 4096 --save-knnlm-dstore --dstore-mmap "$out/plain/dstore"

stage knn-index "$out/plain/knn.index.l2" python build_dstore.py --dstore_mmap "$out/plain/dstore" \
  --faiss_index "$out/plain/knn.index" --ncentroids 1024 --code_size 16 --train_size 40000 \
  --num_keys_to_add_at_a_time 500000

evaluate=("${model[@]}" --sample-break-mode none --context-window 32 --max-tokens 2048)
knn=(--knnlm --dstore-filename "$out/plain/dstore" --indexfile "$out/plain/knn.index.l2" --k 256 --probe 8
  --softmax-temp 10)
# The share of the neighbours is chosen on valid, and that one alone is tried on test.
for weight in 0.1 0.2 0.3; do
  stage knn-$weight.valid "$out/knn-$weight.valid.json" python eval_lm.py $data "${evaluate[@]}" "${knn[@]}" \
    --gen-subset valid --lmbda $weight --eval-file "$out/knn-$weight.valid.json"
done
weight=$(python train_scripts/shakespeare_demo_report.py "$out" --best-weight)
stage knn-$weight.test "$out/knn-$weight.test.json" python eval_lm.py $data "${evaluate[@]}" "${knn[@]}" \
  --gen-subset test --lmbda $weight --eval-file "$out/knn-$weight.test.json"

python train_scripts/shakespeare_demo_report.py "$out"
