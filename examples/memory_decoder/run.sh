#!/usr/bin/env bash
# Memory Decoder (arXiv 2508.09874) on Shakespeare's plays, from the data to a table, on a CPU: a small language model with
# a datastore of its train text (kNN-LM, 1911.00172), and a small decoder that learns what the neighbours say and stands in
# for the datastore, trained by train.py and by transformers' Trainer.
#   bash examples/memory_decoder/run.sh [FOLDER]            (default: output/memory-decoder)
#   SEED=2 bash examples/memory_decoder/run.sh output/memory-decoder-2
# Started again, it skips what is done and goes on with what was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-output/memory-decoder}
seed=${SEED:-1} updates=${UPDATES:-240} decoder_updates=${DECODER_UPDATES:-480} k=${K:-64} width=${WIDTH:-96}
text=${TEXT:-$out/plays}
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING}
mkdir -p "$out"
source train_scripts/stages.sh

# Text: the first tokens of the plays.
if [ -z "${TEXT:-}" ]; then
  stage plays "$text/test.txt" bash get_data.sh shakespeare "$out/plays-bin" --text-dir "$text" --text-only
fi
stage text "$out/text/test.txt" python examples/gnn_lm/text.py "$text" "$out/text" \
  --train-tokens "${TRAIN_TOKENS:-250000}" --eval-tokens "${EVAL_TOKENS:-15000}"
data=$out/data
stage data "$data/test.idx" python preprocess.py --only-source --trainpref "$out/text/train.txt" \
  --validpref "$out/text/valid.txt" --testpref "$out/text/test.txt" --destdir "$data" --thresholdsrc "${THRESHOLD:-3}"

block=128 context=64
training=(--cpu --tokens-per-sample $block --seed "$seed" --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.1
  --lr-scheduler polynomial_decay --warmup-updates 30 --no-epoch-checkpoints --log-format simple --log-interval 50)
reading=(--cpu --tokens-per-sample $block --context-window $context --max-tokens 2048)
lm=$out/lm/checkpoint_best.pt

stage lm-train "$out/lm/train.run.json" env LOGLEVEL=INFO python train.py "$data" "${training[@]}" --arch transformer_lm \
  --criterion adaptive_loss --decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512 \
  --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 \
  --adaptive-input --adaptive-input-cutoff 1000,3000 --adaptive-input-factor 1 \
  --adaptive-softmax-cutoff 1000,3000 --adaptive-softmax-factor 1 --tie-adaptive-weights \
  --dropout 0.1 --lr 0.004 --max-tokens 1024 --total-num-update "$updates" --max-update "$updates" --save-dir "$out/lm"

# The datastore, and the neighbours of every token of every split. The first tokens of a split are read with less context.
stage store "$out/store.json" python eval_lm.py "$data" "${reading[@]}" --path "$lm" --gen-subset train \
  --save-knnlm-dstore --dstore-mmap "$out/store" --dstore-all-tokens
for split in train valid test; do
  stage "neighbors-$split" "$out/$split.retrieval" python eval_lm.py "$data" "${reading[@]}" --path "$lm" \
    --gen-subset $split --knnlm --dstore-filename "$out/store" --k "$k" --lmbda 0.2 --save-retrieval "$out/$split.retrieval"
  [ $split = train ] || stage "lm-$split" "$out/lm.$split.json" python eval_lm.py "$data" "${reading[@]}" --path "$lm" \
    --gen-subset $split --eval-file "$out/lm.$split.json" --scores-file "$out/lm.$split.npz"
done
stage knn "$out/knn.json" python -m fairseq_cli.memory.knn_sweep "$out/valid.retrieval" --report "$out/test.retrieval" \
  --lmbda 0:0.6:0.02 --temperature 1,2,5,10,20,50,100 --k "$((k / 4)),$((k / 2)),$k" --out "$out/knn"

# The neighbours' distribution at every token of the train text, at the temperature that was best on valid.
temperature=$(python examples/memory_decoder/report.py "$out" --best softmax_temp)
stage targets "$out/train.arrow" python -m fairseq_cli.datastore export-knn-targets "$out/train.retrieval" \
  --softmax-temp "$temperature" --out "$out/train.arrow"

# decoder NAME ALPHA: a decoder half as wide that reads plain text; with ALPHA 0 it learns from the text alone.
decoder() {
  stage "$1-train" "$out/$1/train.run.json" env LOGLEVEL=INFO python train.py "$data" "${training[@]}" \
    --arch transformer_lm --criterion memory_decoder_loss --knn-targets "$out/train.arrow" --knn-alpha "$2" \
    --decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim $((4 * width)) --decoder-embed-dim "$width" \
    --decoder-input-dim "$width" --decoder-output-dim "$width" --share-decoder-input-output-embed \
    --dropout 0.1 --lr 0.004 --max-tokens 1024 --total-num-update "$decoder_updates" --max-update "$decoder_updates" \
    --save-interval-updates 40 --keep-interval-updates 1 --patience 6 --save-dir "$out/$1"
  for split in valid test; do
    stage "$1-$split" "$out/$1.$split.json" python eval_lm.py "$data" "${reading[@]}" --path "$out/$1/checkpoint_best.pt" \
      --gen-subset $split --eval-file "$out/$1.$split.json" --scores-file "$out/$1.$split.npz"
  done
}
decoder decoder 0.5
decoder text-decoder 0

# The same targets in transformers: a GPT-2 of that size, trained by its Trainer.
stage transformers-train "$out/transformers/config.json" python examples/memory_decoder/transformers_decoder.py train \
  "$out/train.arrow" "$out/transformers" --types "$(($(wc -l < "$data/dict.txt") + 4))" --width "$width" --block $block \
  --updates "$decoder_updates" --seed "$seed"
for split in valid test; do
  stage "transformers-$split" "$out/transformers.$split.npz" python examples/memory_decoder/transformers_decoder.py score \
    "$data/$split" "$out/transformers" --block $block --context $context --out "$out/transformers.$split.npz"
done

# The share of each decoder is chosen on valid, and that one alone is tried on test; one evaluation proves itself.
python examples/memory_decoder/report.py "$out"
weight=$(python examples/memory_decoder/report.py "$out" --best decoder)
stage decoder-mixed "$out/mixed.test.json" python eval_lm.py "$data" "${reading[@]}" --path "$lm" --gen-subset test \
  --memory-decoder "$out/decoder/checkpoint_best.pt" --decoder-weight "$weight" --prove --eval-file "$out/mixed.test.json"
