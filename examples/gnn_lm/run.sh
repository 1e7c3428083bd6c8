#!/usr/bin/env bash
# GNN-LM (arXiv 2110.08743) on Shakespeare's plays, from the data to a table, on a CPU: a small language model, alone and
# with a datastore of its train text (kNN-LM, 1911.00172); with layers that read its neighbours; and with both.
#   bash examples/gnn_lm/run.sh [FOLDER]            (default: output/gnn-lm)
#   SEED=2 PARTS=main bash examples/gnn_lm/run.sh output/gnn-lm-2
#   TEXT=/a/folder/with/{train,valid,test}.txt TRAIN_TOKENS=250000 EVAL_TOKENS=15000 bash examples/gnn_lm/run.sh ...
# Started again, it skips what is done and goes on with what was interrupted. PARTS names what is run: main (the table),
# curve (perplexity by k, the neighbours of a sentence), ablations; and,
# when they are named, held-out and layers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-output/gnn-lm}
seed=${SEED:-1} updates=${UPDATES:-240} graph_updates=${GRAPH_UPDATES:-400} graph_lr=${GRAPH_LR:-0.002} k=${K:-32} width=${WIDTH:-128}
parts=${PARTS:-main curve ablations}
text=${TEXT:-$out/plays}
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING}
mkdir -p "$out"
source train_scripts/stages.sh

for part in $parts; do
  case $part in
  main | curve | ablations | held-out | layers) ;;
  *)
    echo "PARTS: no part '$part'; known: main curve ablations held-out layers" >&2
    exit 2
    ;;
  esac
done

# Text: the first tokens of the plays.
if [ -z "${TEXT:-}" ]; then
  stage plays "$text/test.txt" bash get_data.sh shakespeare "$out/plays-bin" --text-dir "$text" --text-only
fi
stage text "$out/text/test.txt" python examples/gnn_lm/text.py "$text" "$out/text" \
  --train-tokens "${TRAIN_TOKENS:-250000}" --eval-tokens "${EVAL_TOKENS:-15000}"

# binarize NAME TRAIN WORDS...: a data folder whose train split is the named part of the text.
binarize() {
  local name=$1 train=$2
  shift 2
  stage "$name-data" "$out/$name/data/test.idx" python preprocess.py --only-source --trainpref "$out/text/$train.txt" \
    --validpref "$out/text/valid.txt" --testpref "$out/text/test.txt" --destdir "$out/$name/data" "$@"
}

model=(--decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim $((4 * width))
  --decoder-embed-dim "$width" --decoder-input-dim "$width" --decoder-output-dim "$width"
  --adaptive-input --adaptive-input-cutoff 1000,3000 --adaptive-input-factor 1
  --adaptive-softmax-cutoff 1000,3000 --adaptive-softmax-factor 1 --tie-adaptive-weights)
# Blocks of 128 tokens; in evaluation, and when states are saved, half of them is text that was scored before.
block=128 context=64
training=(--cpu --criterion adaptive_loss --tokens-per-sample $block --max-tokens 1024 --seed "$seed"
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.1 --lr-scheduler polynomial_decay --warmup-updates 30
  --no-epoch-checkpoints --log-format simple --log-interval 50)
reading=(--cpu --tokens-per-sample $block --context-window $context --max-tokens 2048)
# Neighbours from this distance on have read nothing that they help to predict: a block and what its states have read.
band=$((2 * block))

# language_model FOLDER DATA
language_model() {
  stage "$1-lm" "$out/$1/lm/train.run.json" env LOGLEVEL=INFO python train.py "$2" "${training[@]}" "${model[@]}" \
    --arch transformer_lm --dropout 0.1 --lr 0.004 --total-num-update "$updates" --max-update "$updates" \
    --save-dir "$out/$1/lm"
}

# memory FOLDER DATA CHECKPOINT: states of every token, an index of the train split's, and neighbours of all.
memory() {
  local name=$1 data=$2 checkpoint=$3 split stores=$out/$1/stores
  for split in train valid test; do
    stage "$name-store-$split" "$stores/$split.json" python eval_lm.py "$data" "${reading[@]}" --path "$checkpoint" \
      --gen-subset $split --save-knnlm-dstore --dstore-mmap "$stores/$split" --knn-keytype model_output \
      --dstore-all-tokens --dstore-fp16
  done
  stage "$name-words" "$out/$name/words.json" python examples/gnn_lm/words.py "$stores/train" "$checkpoint" \
    "$out/$name/words"
  index "$name" "$stores/train" "$out/$name/index"
  for split in train valid test; do
    stage "$name-neighbors-$split" "$stores/$split.neighbors.json" python -m fairseq_cli.memory.neighbors \
      "$stores/$split" --dstore-filename "$stores/train" --indexfile "$out/$name/index" --probe 8 \
      --k "$k" --invalid-neighbor-context $band
  done
}

# index NAME STORE FILE
index() {
  stage "$1-index" "$3.cos" python build_dstore.py --dstore_mmap "$2" --faiss_index "$3" --dist cos --index ivfsq8 \
    --ncentroids "${LISTS:-1024}" --train_size 40000 --no-report
}

# graph NAME FOLDER DATA STORES CHECKPOINT WORDS...: one layer over a language model that stays as it is. It reads what
# followed each neighbour (words.py).
graph() {
  local name=$1 folder=$2 data=$3 stores=$4 checkpoint=$5
  shift 5
  stage "$folder-$name" "$out/$folder/$name/train.run.json" env LOGLEVEL=INFO python train.py "$data" "${training[@]}" \
    "${model[@]}" --arch transformer_lm_gnn --finetune-from-model "$checkpoint" --graph-stores "$stores" \
    --use-precompute-feat --graph-features "$out/$folder/words" --gcn-k "$k" --max-tokens 2048 \
    --graph-layer 1 --neighbor-context 0 --graph-attention-heads 4 \
    --lr "$graph_lr" --total-num-update "$graph_updates" --max-update "$graph_updates" \
    --save-interval-updates 50 --keep-interval-updates 1 --patience 4 --save-dir "$out/$folder/$name" "$@"
}

# score NAME DATA CHECKPOINT SPLIT WORDS...: one perplexity, in NAME.SPLIT.json.
score() {
  local name=$1 data=$2 checkpoint=$3 split=$4
  shift 4
  stage "$name.$split" "$out/$name.$split.json" python eval_lm.py "$data" "${reading[@]}" --path "$checkpoint" \
    --gen-subset "$split" --eval-file "$out/$name.$split.json" "$@"
}

# both NAME DATA CHECKPOINT WORDS...: valid and test.
both() {
  local name=$1 data=$2 checkpoint=$3
  shift 3
  score "$name" "$data" "$checkpoint" valid "$@"
  score "$name" "$data" "$checkpoint" test "$@"
}

# interpolate NAME DATA CHECKPOINT STORE INDEX WORDS...: one search of each split, and the settings that are best on valid.
interpolate() {
  local name=$1 data=$2 checkpoint=$3 store=$4 index=$5 split
  shift 5
  for split in valid test; do
    stage "$name-search.$split" "$out/$name.$split.retrieval" python eval_lm.py "$data" "${reading[@]}" \
      --path "$checkpoint" --gen-subset $split --knnlm --dstore-filename "$store" --indexfile "$index" --probe 8 \
      --faiss-metric-type cos --k 256 --lmbda 0.1 --softmax-temp 0.01 --dstore-fp16 \
      --save-retrieval "$out/$name.$split.retrieval" "$@"
  done
  stage "$name" "$out/$name.json" python -m fairseq_cli.memory.knn_sweep "$out/$name.valid.retrieval" \
    --report "$out/$name.test.retrieval" --lmbda 0:0.6:0.02 --temperature 0.004,0.006,0.01,0.015,0.02,0.03,0.05 \
    --k 16,64,256 --out "$out/$name"
}

data=$out/all/data lm=$out/all/lm/checkpoint_best.pt stores=$out/all/stores gnn=$out/all/gnn/checkpoint_best.pt
binarize all train --thresholdsrc "${THRESHOLD:-3}"
language_model all $data
memory all $data $lm
read_graph=(--graph-stores "$stores" --use-precompute-feat)
graph gnn all $data "$stores" $lm --no-intra-edges

main() {
  both lm $data $lm
  both gnn $data $gnn "${read_graph[@]}" --output-position-stats
  interpolate knn $data $lm "$stores/train" "$out/all/index" --knn-keytype model_output
  interpolate gnn-knn $data $gnn "$stores/train" "$out/all/index" --knn-keytype lm_output "${read_graph[@]}"
  # The other way: a store of what the layers say of the train text.
  stage gnn-store "$out/all/gnn-store.json" python eval_lm.py $data "${reading[@]}" --path $gnn --gen-subset train \
    --save-knnlm-dstore --dstore-mmap "$out/all/gnn-store" --knn-keytype model_output --dstore-fp16 "${read_graph[@]}"
  index gnn-store "$out/all/gnn-store" "$out/all/gnn-index"
  interpolate gnn-own-knn $data $gnn "$out/all/gnn-store" "$out/all/gnn-index" --knn-keytype model_output \
    "${read_graph[@]}"
}

curve() {
  local count
  for ((count = 1; count <= k; count *= 2)); do
    score "gnn-k$count" $data $gnn valid "${read_graph[@]}" --gcn-k $count
  done
  stage sentence "$out/sentence.txt" python examples/gnn_lm/view.py "$stores" "$data/dict.txt" \
    --first "${SENTENCE:-1000}" --out "$out/sentence.txt" >/dev/null
}

# The layer with another token's neighbours: in evaluation alone, and in training too.
ablations() {
  stage shuffled "$out/all/shuffled/test.neighbors.json" python examples/gnn_lm/shuffle.py "$stores" \
    "$out/all/shuffled" --seed "$seed"
  score gnn-shuffled-later $data $gnn test --graph-stores "$out/all/shuffled" --use-precompute-feat
  graph shuffled-gnn all $data "$out/all/shuffled" $lm --no-intra-edges
  both gnn-shuffled $data "$out/all/shuffled-gnn/checkpoint_best.pt" --graph-stores "$out/all/shuffled" \
    --use-precompute-feat
}

# A layer that reads its own text too; and two layers over the language model's states of a neighbour and of one position
# to each side, nearer to the paper and slow.
layers() {
  graph intra-gnn all $data "$stores" $lm
  both gnn-intra $data "$out/all/intra-gnn/checkpoint_best.pt" "${read_graph[@]}"
  local graph_updates=200 graph_lr=0.0005
  graph keys-gnn all $data "$stores" $lm --graph-features "$stores/train" --graph-layer 2 --neighbor-context 1 --gcn-k 8
  both gnn-keys $data "$out/all/keys-gnn/checkpoint_best.pt" "${read_graph[@]}"
  both gnn-states $data "$out/all/keys-gnn/checkpoint_best.pt" "${read_graph[@]}" --graph-states "$out/all/states"
  local count
  for count in 1 16; do
    score "gnn-keys-k$count" $data "$out/all/keys-gnn/checkpoint_best.pt" valid "${read_graph[@]}" --gcn-k $count
  done
}

# Layers that are trained on the second half of the text: with states of a language model that was fitted to that half, and
# of one that was fitted to the first half and has not read it.
held_out() {
  local half
  for half in first second; do binarize $half $half --srcdict "$data/dict.txt"; done
  for half in first second; do
    language_model $half "$out/$half/data"
    memory $half "$out/second/data" "$out/$half/lm/checkpoint_best.pt"
    graph gnn $half "$out/second/data" "$out/$half/stores" "$out/$half/lm/checkpoint_best.pt" --no-intra-edges
    both $half-lm "$out/second/data" "$out/$half/lm/checkpoint_best.pt"
    score $half-lm "$out/second/data" "$out/$half/lm/checkpoint_best.pt" train
    both $half-gnn "$out/second/data" "$out/$half/gnn/checkpoint_best.pt" --graph-stores "$out/$half/stores" \
      --use-precompute-feat
  done
}

for part in $parts; do ${part/-/_}; done
python examples/gnn_lm/report.py "$out"
