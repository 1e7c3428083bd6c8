#!/usr/bin/env bash
# Translation with memory on Multi30k (German to English, 29,000 pairs), from the data to a table, on two CPU cores: a small
# transformer, the same with a datastore of its training pairs (kNN-MT, arXiv 2010.00710), with a learned combiner
# (adaptive kNN-MT, 2105.13022), and a model that is trained with memory (TrimeMT, 2205.12674).
#   bash examples/translation/run.sh [FOLDER]            (default: output/translation)
#   SEED=2 EPOCHS=8 bash examples/translation/run.sh output/seed2
#   DATA_MIRROR=/a/folder/with/the/six/files bash examples/translation/run.sh
# Started again, it skips what is done and goes on with what was interrupted. JOBS processes run side by side (default 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-output/translation}
seed=${SEED:-1} epochs=${EPOCHS:-6} jobs=${JOBS:-2}
data=data-bin/multi30k.de-en
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
source examples/translation/stages.sh

# together COMMAND COMMAND: both side by side; fails if one does.
together() {
  if [ "$jobs" -lt 2 ]; then "$1" && "$2"; return; fi
  local first second failed=0
  "$1" & first=$!
  "$2" & second=$!
  wait $first || failed=1
  wait $second || failed=1
  return $failed
}
trap 'trap - INT TERM; kill 0' INT TERM  # side by side, they do not hear an interrupt of their own

stage data $data/test.de-en.en.idx bash get_data.sh multi30k

model=(--task translation --cpu --arch transformer_iwslt_de_en --encoder-layers 2 --decoder-layers 2
  --encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256
  --share-decoder-input-output-embed --encoder-normalize-before --decoder-normalize-before)
training=("${model[@]}" --optimizer adam --adam-betas '(0.9, 0.98)' --lr 4e-3 --lr-scheduler inverse_sqrt
  --warmup-updates 500 --dropout 0.1 --weight-decay 0.0001 --max-epoch "$epochs" --seed "$seed"
  --no-epoch-checkpoints --log-format simple --log-interval 500)

# train NAME WORDS...
train() {
  local name=$1
  shift
  stage "$name-train" "$out/$name/train.run.json" env LOGLEVEL=INFO python train.py $data "${training[@]}" \
    --save-dir "$out/$name" "$@"
}

train_plain() { train plain --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 1500; }

# Batches whose target sentences are alike, found by BM25, are TrimeMT's memory in training. They hold sentences of all
# lengths, so that twice the tokens with padding are as many updates an epoch, of as many words, as the plain model's.
train_trime() {
  local bm25=$out/bm25
  stage samples "$bm25/samples/samples.json" python train.py $data "${training[@]}" --max-tokens 3000 --eval-bleu-detok moses --eval-bleu-remove-bpe \
    --output-samples-to-file "$bm25/samples/samples.json"
  stage bm25 "$bm25/results/shard0.json" python bm25_search.py --index_path "$bm25/index" \
    --segments_path "$bm25/samples/samples.json" --results_path "$bm25/results"
  stage batches "$bm25/batches.json" python bm25_make_batches.py --results_path "$bm25/results" \
    --batch_file "$bm25/batches.json"
  train trime --criterion trime_mt_loss --predefined-batches "$bm25/batches.json" --max-tokens 3000 --dist-func ip \
    --temp 10 --topk-mem 8
}

together train_plain train_trime

plain=$out/plain/checkpoint_best.pt trime=$out/trime/checkpoint_best.pt
store_plain() { store plain $data "$plain" "$out/plain/store" l2; }
store_trime() { store trime $data "$trime" "$out/trime/store" ip; }
together store_plain store_trime

neighbors=(--knnmt --dstore-filename "$out/plain/store" --indexfile "$out/plain/store/knn_index" --probe 8 --knn-temp 10)
trime_neighbors=(--knnmt --dstore-filename "$out/trime/store" --indexfile "$out/trime/store/knn_index" --probe 8
  --knn-lambda-type trime --faiss-metric-type ip)

# Number of neighbours and their share are chosen on valid.
sweep() {
  local k share
  for k in $1; do
    for share in 0.1 0.2 0.3 0.4; do
      translate "knn-k$k-share$share" $data "$plain" valid "${neighbors[@]}" --k "$k" --lmbda $share
    done
  done
}
sweep_4_8() { sweep "4 8"; }
sweep_16_and_trime() {
  sweep 16
  local temperature
  for temperature in 5 10 20; do
    translate "trime-temp$temperature" $data "$trime" valid "${trime_neighbors[@]}" --k 8 --knn-temp $temperature
  done
  translate plain $data "$plain" valid
}
together sweep_4_8 sweep_16_and_trime
chosen=$(python examples/translation/report.py "$out" --chosen k,share)
k=${chosen% *} share=${chosen#* }
temperature=$(python examples/translation/report.py "$out" --chosen temp)

test_plain() {
  stage combiner "$out/plain/combiner-adaptive.run.json" python train_combiner.py $data --cpu --max-tokens 4096 \
    --path "$plain" --dstore-filename "$out/plain/store" \
    --indexfile "$out/plain/store/knn_index" --probe 8 --k 8 --knn-temp 10 --kind adaptive
  translate adaptive $data "$plain" test "${neighbors[@]}" --knn-lambda-type adaptive \
    --combiner "$out/plain/combiner-adaptive.safetensors"
}
test_others() {
  translate plain $data "$plain" test
  translate trime-alone $data "$trime" test
  translate knn $data "$plain" test "${neighbors[@]}" --k "$k" --lmbda "$share"
  translate trime $data "$trime" test "${trime_neighbors[@]}" --k 8 --knn-temp "$temperature"
}
together test_plain test_others

python examples/translation/report.py "$out"
