# Sourced by run.sh and domain.sh: the stages of both, each skipped when its result is there. $out is the folder of results.
source train_scripts/stages.sh

# store NAME DATA CHECKPOINT FOLDER DISTANCE: a datastore of the training pairs, and its index.
store() {
  local name=$1 data=$2 checkpoint=$3 folder=$4 distance=$5
  stage "$name-store" "$folder/datastore.run.json" python save_datastore.py "$data" --cpu --valid-subset train \
    --path "$checkpoint" --max-tokens 4096 --dstore-fp16 --dstore-mmap "$folder"
  stage "$name-index" "$folder/knn_index.$distance" python build_dstore.py --dstore_mmap "$folder" \
    --faiss_index "$folder/knn_index" --dist "$distance" --index ivfsq8 --ncentroids 1024 --no-report
}

# translate NAME DATA CHECKPOINT SPLIT WORDS...: one split, with lines, plain texts and scores in $out/NAME.SPLIT.
translate() {
  local name=$1 data=$2 checkpoint=$3 split=$4
  shift 4
  stage "$name.$split" "$out/$name.$split/generate-$split.run.json" python generate.py "$data" --cpu \
    --gen-subset "$split" --path "$checkpoint" --beam 4 --lenpen 0.6 --max-len-a 1.2 --max-len-b 10 --max-tokens 4096 \
    --remove-bpe --tokenizer moses --scoring sacrebleu --quiet --results-path "$out/$name.$split" "$@" >/dev/null
}
