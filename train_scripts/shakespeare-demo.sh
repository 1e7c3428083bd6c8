#!/usr/bin/env bash
# From nothing to a table, on Shakespeare's plays: a small language model, alone and with a datastore of its own training
# text (kNN-LM, arXiv 1911.00172), and models that are trained with memory (TRIME, arXiv 2205.12674). Two CPU cores, a
# few minutes; the first line says how many on this machine. Run it again to resume an interrupted demo: what is done is
# skipped. Remove demo/ to start afresh.
#   bash train_scripts/shakespeare-demo.sh [FOLDER]     (default: demo)
#   UPDATES=300 SEED=2 VARIANTS="plain local" JOBS=1 bash train_scripts/shakespeare-demo.sh ...
# VARIANTS names the models, all trained for as many updates: plain (which kNN-LM needs), and TRIME's local, long and
# external. JOBS of them run side by side, by default one per core (train_scripts/stages.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$(date +%s)
out=${1:-demo}
data=data-bin/shakespeare
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export LOGLEVEL=${LOGLEVEL:-WARNING} UPDATES=${UPDATES:-250} VARIANTS=${VARIANTS:-plain local long external}
source train_scripts/stages.sh

model=(--path "$out/plain/checkpoint_best.pt" --cpu --knn-keytype last_ffn_input)
evaluate=("${model[@]}" --sample-break-mode none --context-window 32 --max-tokens 2048)
knn=(--knnlm --dstore-filename "$out/plain/dstore" --indexfile "$out/plain/knn.index.l2" --k 256 --probe 8
  --softmax-temp 10 --lmbda 0.2)

# The models, and TRIME's evaluations: the same script as the example's.
variant() {
  VARIANTS=$1 bash examples/trime/run.sh "$out"
}

plain_and_knn() {
  variant plain
  stage knn-store "$out/plain/dstore.run.json" python eval_lm.py $data "${model[@]}" --gen-subset train \
    --sample-break-mode none --context-window 16 --max-tokens 4096 --save-knnlm-dstore --dstore-mmap "$out/plain/dstore"
  stage knn-index "$out/plain/knn.index.l2" python build_dstore.py --dstore_mmap "$out/plain/dstore" \
    --faiss_index "$out/plain/knn.index" --ncentroids 1024 --code_size 16 --train_size 40000 \
    --num_keys_to_add_at_a_time 500000 --no-report
  local split
  for split in valid test; do
    stage knn.$split "$out/knn.$split.json" python eval_lm.py $data "${evaluate[@]}" "${knn[@]}" --gen-subset $split \
      --save-retrieval "$out/plain/$split.retrieval" --eval-file "$out/knn.$split.json"
  done
  # The share of the neighbours is chosen on valid, and that one alone is tried on test.
  stage knn-sweep "$out/knn.sweep.json" python -m fairseq_cli.memory.knn_sweep "$out/plain/valid.retrieval" \
    --lmbda 0.1,0.2,0.3 --report "$out/plain/test.retrieval" --out "$out/knn.sweep"
}

everything() {
  stage data $data/test.idx bash get_data.sh shakespeare
  local name
  for name in external plain long local; do # the longest first
    case " $VARIANTS " in *" $name "*) ;; *) continue ;; esac
    if [ $name = plain ]; then chain plain plain_and_knn; else chain $name variant $name; fi
  done
  finish_chains
}

if [ -n "${LIST_STAGES:-}" ]; then
  everything
  exit
fi
mkdir -p "$out"
LIST_STAGES=1 everything | python train_scripts/shakespeare_demo_time.py "$out" --updates "$UPDATES" \
  --side-by-side "$chain_slots" --threads "$chain_threads"
everything
python train_scripts/shakespeare_demo_report.py "$out" --took $(($(date +%s) - began))
