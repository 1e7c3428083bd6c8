#!/usr/bin/env bash
# From nothing to a table: a small language model on Shakespeare's plays, alone and with a datastore of its own training
# text (kNN-LM, arXiv 1911.00172). Two CPU cores, a few minutes. Started again, it skips what is done and goes on with
# what was interrupted; remove demo/ to start afresh.
#   bash train_scripts/shakespeare-demo.sh [FOLDER]     (default: demo)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-demo}
data=data-bin/shakespeare
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING}
mkdir -p "$out"

# stage NAME RESULT COMMAND...: run the command unless its result is there; note how long it took.
stage() {
  local name=$1 result=$2 begin
  shift 2
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
    return
  fi
  echo "== $name"
  begin=$(date +%s)
  "$@"
  echo $(($(date +%s) - begin)) > "$out/$name.seconds"
}

stage data $data/test.idx bash get_data.sh shakespeare

# Adaptive input and softmax with tied weights, as the paper's WikiText-103 model has, at a size for a processor.
stage train "$out/model/train.run.json" env LOGLEVEL=INFO python train.py --task language_modeling $data \
  --save-dir "$out/model" --cpu \
  --arch transformer_lm_wiki103 --decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512 \
  --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 \
  --adaptive-input-cutoff 2000,5000 --adaptive-softmax-cutoff 2000,5000 \
  --dropout 0.0 --attention-dropout 0.0 --activation-dropout 0.0 --adaptive-softmax-dropout 0.0 \
  --criterion adaptive_loss --optimizer adam --adam-betas '(0.9,0.98)' --clip-norm 0.1 --seed 1 \
  --lr 0.004 --lr-scheduler polynomial_decay --warmup-updates 50 --total-num-update 1000 --max-update 1000 \
  --max-tokens 1024 --tokens-per-sample 256 --sample-break-mode none --no-epoch-checkpoints --log-format simple \
  --log-interval 100

model=(--path "$out/model/checkpoint_best.pt" --cpu --knn-keytype last_ffn_input)
stage store "$out/dstore.run.json" python eval_lm.py $data "${model[@]}" --gen-subset train \
  --sample-break-mode none --max-tokens 4096 --save-knnlm-dstore --dstore-mmap "$out/dstore"

stage index "$out/knn.index.l2" python build_dstore.py --dstore_mmap "$out/dstore" --faiss_index "$out/knn.index" \
  --ncentroids 1024 --code_size 16 --train_size 40000 --num_keys_to_add_at_a_time 500000

evaluate=("${model[@]}" --sample-break-mode none --context-window 128 --max-tokens 2048)
knn=(--knnlm --dstore-filename "$out/dstore" --indexfile "$out/knn.index.l2" --k 256 --probe 8 --softmax-temp 10)
for split in valid test; do
  stage plain.$split "$out/plain.$split.json" python eval_lm.py $data "${evaluate[@]}" --gen-subset $split \
    --eval-file "$out/plain.$split.json"
done
# The share of the neighbours is chosen on valid, and that one alone is tried on test.
for weight in 0.1 0.2 0.3; do
  stage knn-$weight.valid "$out/knn-$weight.valid.json" python eval_lm.py $data "${evaluate[@]}" "${knn[@]}" \
    --gen-subset valid --lmbda $weight --eval-file "$out/knn-$weight.valid.json"
done
weight=$(python train_scripts/shakespeare_demo_report.py "$out" --best-weight)
stage knn-$weight.test "$out/knn-$weight.test.json" python eval_lm.py $data "${evaluate[@]}" "${knn[@]}" \
  --gen-subset test --lmbda $weight --eval-file "$out/knn-$weight.test.json"

python train_scripts/shakespeare_demo_report.py "$out"
