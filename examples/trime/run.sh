#!/usr/bin/env bash
# TRIME's three variants on Shakespeare's plays, from the data to perplexities, on a processor (arXiv 2205.12674).
#   bash examples/trime/run.sh [FOLDER]        (default: output/trime-example)
#   SEED=2 UPDATES=300 VARIANTS="plain local" bash examples/trime/run.sh ...
# Run it again to resume an interrupted run; what is done is skipped. Variants run side by side, one per core
# (train_scripts/stages.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-output/trime-example}
seed=${SEED:-1} updates=${UPDATES:-500} variants=${VARIANTS:-plain local long external}
data=data-bin/shakespeare
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING}
source train_scripts/stages.sh

for name in $variants; do
  case $name in
  plain | local | long | external) ;;
  *)
    echo "VARIANTS: no variant '$name'; known: plain local long external" >&2
    exit 2
    ;;
  esac
done

[ -n "${CHAIN:-}" ] || stage data $data/test.idx bash get_data.sh shakespeare

# Every variant has the model, the updates and the tokens per update of the others; only criterion and batches differ.
model=(--arch transformer_lm_wiki103 --decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512
  --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
  --adaptive-input-cutoff 2000,5000 --adaptive-softmax-cutoff 2000,5000
  --dropout 0.0 --attention-dropout 0.0 --activation-dropout 0.0 --adaptive-softmax-dropout 0.0
  --knn-keytype last_ffn_input)
training=(--task language_modeling $data --cpu "${model[@]}"
  --optimizer adam --adam-betas '(0.9,0.98)' --clip-norm 0.1 --seed "$seed"
  --lr 0.004 --lr-scheduler polynomial_decay --warmup-updates 50 --total-num-update "$updates" --max-update "$updates"
  --max-tokens 2048 --tokens-per-sample 64 --sample-break-mode none --no-epoch-checkpoints
  --log-format simple --log-interval 100)

# train NAME WORDS...: one model.
train() {
  local name=$1
  shift
  stage "$name-train" "$out/$name/train.run.json" env LOGLEVEL=INFO python train.py "${training[@]}" \
    --save-dir "$out/$name" "$@"
}

# evaluate NAME PROGRAM WORDS...: valid and test.
evaluate() {
  local name=$1 program=$2 split
  shift 2
  for split in valid test; do
    stage "$name.$split" "$out/$name.$split.json" python "$program" $data --path "$out/$name/checkpoint_best.pt" --cpu \
      --knn-keytype last_ffn_input --sample-break-mode none --context-window 32 --max-tokens 2048 \
      --gen-subset $split --eval-file "$out/$name.$split.json" "$@"
  done
}

# variant NAME: train and evaluate it.
variant() {
  case $1 in
  plain)
    train plain --criterion adaptive_loss
    evaluate plain eval_lm.py
    ;;
  local) # what the model has read of its own segment
    train local --criterion trime_loss
    evaluate local eval_lm-trime.py --use-local
    ;;
  long) # consecutive segments in a batch: the text before
    train long --criterion trime_long_loss_same_device --keep-order
    evaluate long eval_lm-trime.py --use-local --use-long --mem-size 2048
    ;;
  external) # segments that BM25 finds alike in a batch: any other text
    bm25=$out/bm25
    stage segments "$bm25/segments/segments.json" python train.py "${training[@]}" \
      --output-segments-to-file "$bm25/segments/segments.json"
    stage bm25 "$bm25/results/shard0.json" python bm25_search.py --index_path "$bm25/index" \
      --segments_path "$bm25/segments/segments.json" --results_path "$bm25/results"
    stage batches "$bm25/batches.json" python bm25_make_batches.py --results_path "$bm25/results" \
      --batch_file "$bm25/batches.json"
    train external --criterion trime_ext_loss --cross-sent-ratio 0.3 --predefined-batches "$bm25/batches.json"
    stage store "$out/external/dstore.run.json" python eval_lm.py $data --path "$out/external/checkpoint_best.pt" --cpu \
      --knn-keytype last_ffn_input --gen-subset train --sample-break-mode none --context-window 16 --max-tokens 4096 \
      --save-knnlm-dstore --dstore-mmap "$out/external/dstore"
    stage index "$out/external/knn.index.ip" python build_dstore.py --dstore_mmap "$out/external/dstore" \
      --faiss_index "$out/external/knn.index" --dist ip --ncentroids 1024 --code_size 16 --train_size 40000 \
      --num_keys_to_add_at_a_time 500000 --no-report
    evaluate external eval_lm-trime.py --use-local --use-long --mem-size 2048 --use-external \
      --dstore-filename "$out/external/dstore" --indexfile "$out/external/knn.index.ip" --faiss-metric-type ip \
      --k 64 --probe 8 --mode li --interp-temp 4 --lmbda 0.1
    ;;
  esac
}

for name in external plain long local; do # the longest first
  case " $variants " in *" $name "*) chain "$name" variant "$name" ;; esac
done
finish_chains
