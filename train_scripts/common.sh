# Sourced by the training scripts: devices and precision come from the environment, tokens per update stay as published.
#   NUM_GPUS     devices to train on (default: all that nvidia-smi lists; 0 trains on the processor)
#   PRECISION    fp16, bf16 or fp32 (default: fp16 on GPUs, fp32 without)
#   OUTPUT       folder for checkpoints (default: output/<name of the script>)
#   DATA         data folder (default: data-bin/<data set>)
# Words after the script's name go to train.py, and override what is set here: --max-update 100 tries a script out.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
if [ -z "${NUM_GPUS:-}" ]; then
  NUM_GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || NUM_GPUS=0
fi
devices=$((NUM_GPUS > 0 ? NUM_GPUS : 1))
PRECISION=${PRECISION:-$([ "$NUM_GPUS" -gt 0 ] && echo fp16 || echo fp32)}
name=$(basename "$0" .sh)
OUTPUT=${OUTPUT:-output/$name}

# share TOKENS_PER_UPDATE MOST SEGMENT: sets $tokens (per device and step: at most MOST, whole segments) and $freq (steps
# per update), so that an update sees as many tokens as published.
share() {
  for ((freq = 1; freq * devices * $3 <= $1; freq++)); do
    tokens=$(($1 / (freq * devices)))
    if ((tokens <= $2 && $1 % (freq * devices) == 0 && tokens % $3 == 0)); then return; fi
  done
  echo "$name: the $1 tokens of an update cannot be shared out to $devices devices in whole segments of $3;" \
    "set NUM_GPUS to a number that divides $(($1 / $3))" >&2
  exit 2
}

# start WORDS...: train.py on the devices and in the precision; after a call of share.
start() {
  local where=(--cpu) precision=()
  [ "$NUM_GPUS" -eq 0 ] || where=(--distributed-world-size "$NUM_GPUS")
  [ "$PRECISION" = fp32 ] || precision=("--$PRECISION")
  exec python train.py "$DATA" --save-dir "$OUTPUT" --seed 1 --max-tokens "$tokens" --update-freq "$freq" \
    "${where[@]}" "${precision[@]}" "$@"
}

# train WORDS...: a language model, with what all of them share.
train() {
  start --task language_modeling --sample-break-mode none --skip-invalid-size-inputs-valid-test \
    --knn-keytype last_ffn_input "$@"
}

# translate WORDS...: a translation model, with what both of them share.
translate() {
  start --task translation --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --decoder-normalize-before --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --lr 5e-4 \
    --lr-scheduler inverse_sqrt --warmup-updates 4000 --dropout 0.3 --weight-decay 0.0001 --max-epoch 50 \
    --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' --eval-bleu-detok moses \
    --eval-bleu-remove-bpe --eval-bleu-print-samples --best-checkpoint-metric bleu \
    --maximize-best-checkpoint-metric "$@"
}

# The three settings that the scripts choose from: optimizer and schedule by architecture.
# 247M: as the TRIME repository prints it, which is fairseq's recipe for WikiText-103 (arXiv 1809.10853).
wiki103_247M=(--arch transformer_lm_wiki103 --tokens-per-sample 3072
  --max-update 286000 --max-lr 1.0 --t-mult 2 --lr-period-updates 270000 --lr-scheduler cosine --lr-shrink 0.75
  --warmup-updates 16000 --warmup-init-lr 1e-07 --min-lr 1e-09 --optimizer nag --lr 0.0001 --clip-norm 0.1)
# 150M and 38M: these are the architectures of Transformer-XL's base models; optimizer, rate, schedule and number of
# updates are those of its paper (arXiv 1901.02860). See README.md about what is not known.
wiki103_150M=(--arch transformer_lm_wiki103_150M --tokens-per-sample 150
  --adaptive-input --adaptive-input-factor 1 --adaptive-input-cutoff 20000,40000,200000
  --adaptive-softmax-factor 1 --adaptive-softmax-cutoff 20000,40000,200000 --tie-adaptive-weights --tie-adaptive-proj
  --max-update 200000 --lr-scheduler cosine --lr-period-updates 200000 --max-lr 0.00025 --lr 1e-07
  --warmup-updates 0 --min-lr 1e-09 --optimizer adam --adam-betas '(0.9,0.999)' --clip-norm 0.25)
enwik8_38M=(--arch transformer_lm_enwik8 --tokens-per-sample 512 --share-decoder-input-output-embed
  --max-update 400000 --lr-scheduler cosine --lr-period-updates 400000 --max-lr 0.00025 --lr 1e-07
  --warmup-updates 0 --min-lr 1e-09 --optimizer adam --adam-betas '(0.9,0.999)' --clip-norm 0.25)
