#!/usr/bin/env bash
# All experiments with a model folder and a file of articles: run.sh MODEL ARTICLES.txt [OUT]
set -euo pipefail
model=$1 articles=$2 out=${3:-output/extended-mind}
here=$(dirname "$0") planted=$out/planted
python "$here/planted_questions.py" "$articles" "$planted/questions.jsonl" 20
python "$here/build_counterfactual.py" --base "$here/configs/counterfactual-planted.yaml" \
    questions="$planted/questions.jsonl" edits="$planted/edits.json" tokenizer="$model" out="$planted"
python "$here/run_retrieval.py" --base "$here/configs/retrieval-smollm2.yaml" \
    model="$model" data="$planted" out="$out/retrieval-smollm2"
python "$here/run_perplexity.py" --base "$here/configs/perplexity-smollm2.yaml" \
    model="$model" text="$articles" out="$out/perplexity-smollm2"
python "$here/run_timing.py" --base "$here/configs/timing-smollm2.yaml" \
    model="$model" text="$articles" out="$out/timing-smollm2"
