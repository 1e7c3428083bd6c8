"""Flags of the originals that set nothing here. Each is accepted with one warning that says why.

A value of 0 means the flag is a switch, 1 that it takes a value (which is skipped). Flags that would change the result
and are not offered are in ``REJECTED`` tables: an error with the reason.
"""

from __future__ import annotations

_FABRIC = "Lightning Fabric decides it"
_LAUNCHER = "torchrun or --distributed-world-size sets it"
_TRACKERS = "figures go to the log, --tensorboard-logdir and --wandb-project"
_SCALER = "the loss scale is PyTorch's GradScaler's"
_TRAINING = "it belongs to training and changes no evaluation"
_TRAINING_ALONE = "it belongs to training"

COMMON: dict[str, tuple[int, str]] = {
    "--all-gather-list-size": (1, "figures are summed as tensors"),
    "--bucket-cap-mb": (1, _FABRIC),
    "--broadcast-buffers": (0, _FABRIC),
    "--empty-cache-freq": (1, "PyTorch's allocator needs no such help"),
    "--fp16-no-flatten-grads": (0, "gradients are never flattened"),
    "--fp16-scale-window": (1, _SCALER),
    "--fp16-scale-tolerance": (1, _SCALER),
    "--min-loss-scale": (1, _SCALER),
    "--threshold-loss-scale": (1, _SCALER),
    "--dataset-impl": (1, "data is always memory-mapped"),
    "--data-buffer-size": (1, "--num-workers sets how far batches are prepared ahead"),
    "--tokenizer": (1, "text is binarised by preprocess.py as it stands"),
    "--bpe": (1, "text is binarised by preprocess.py as it stands"),
    "--lm-eval": (0, "eval_lm.py always evaluates a language model"),
}

TRAIN: dict[str, tuple[int, str]] = COMMON | {
    "--ddp-comm-hook": (1, _FABRIC),
    "--gradient-as-bucket-view": (0, _FABRIC),
    "--fp32-reduce-scatter": (0, "gradients are always summed in float32"),
    "--not-fsdp-flatten-parameters": (0, "--strategy fsdp flattens no parameters"),
    "--distributed-backend": (1, "NCCL on GPUs and Gloo on CPUs"),
    "--distributed-rank": (1, _LAUNCHER),
    "--distributed-init-method": (1, _LAUNCHER),
    "--distributed-port": (1, _LAUNCHER),
    "--distributed-no-spawn": (0, _LAUNCHER),
    "--distributed-num-procs": (1, _LAUNCHER),
    "--device-id": (1, _LAUNCHER),
    "--local-rank": (1, _LAUNCHER),
    "--heartbeat-timeout": (1, _LAUNCHER),
    "--fix-batches-to-gpus": (0, "batches are shared out by their place in the epoch's order"),
    "--fast-stat-sync": (0, "figures are always summed as tensors"),
    "--fixed-validation-seed": (1, "validation draws no random numbers"),
    "--use-old-adam": (0, "PyTorch's fused AdamW computes the same"),
    "--use-bmuf": (0, "BMUF is not offered"),
    "--character-filters": (1, "character embeddings are not offered"),
    "--character-embedding-dim": (1, "character embeddings are not offered"),
    "--char-embedder-highway-layers": (1, "character embeddings are not offered"),
    "--aim-repo": (1, _TRACKERS),
    "--aim-run-hash": (1, _TRACKERS),
    "--azureml-logging": (0, _TRACKERS),
    "--on-cpu-convert-precision": (0, "weights are converted once, where the model is"),
    "--amp-batch-retries": (1, _SCALER),
    "--amp-init-scale": (1, _SCALER),
    "--amp-scale-window": (1, _SCALER),
    "--profile": (0, "run a profiler around the command"),
    "--reset-logging": (0, "logging is set up once per command"),
    "--suppress-crashes": (0, "an error always ends the command"),
    "--use-plasma-view": (0, "data is always memory-mapped"),
    "--plasma-path": (1, "data is always memory-mapped"),
    "--scoring": (1, "training generates no text"),
    "--required-seq-len-multiple": (1, "rows are padded to the longest one of their batch"),
    "--gen-subset": (1, "--train-subset and --valid-subset name the splits of training"),
    "--num-shards": (1, "processes share an epoch by --distributed-world-size"),
    "--shard-id": (1, "processes share an epoch by --distributed-world-size"),
    "--grouped-shuffling": (0, "an epoch shuffles whole batches"),
    "--update-epoch-batch-itr": (1, "batches are made once, and shuffled by --seed and epoch"),
    "--update-ordered-indices-seed": (0, "batches are made once, and shuffled by --seed and epoch"),
    "--slowmo-momentum": (1, _FABRIC),
    "--slowmo-base-algorithm": (1, _FABRIC),
    "--localsgd-frequency": (1, _FABRIC),
    "--debug-param-names": (0, "there is nothing to debug so"),
    "--load-checkpoint-on-all-dp-ranks": (0, "every process reads the checkpoint"),
    "--write-checkpoints-asynchronously": (0, "checkpoints are written before training resumes"),
    "--save-async": (0, "checkpoints are written before training resumes"),
    "--left-pad-target": (1, "targets are padded on the right"),
    "--num-batch-buckets": (1, "rows are padded to the longest one of their batch"),
    "--ema-fp32": (0, "the average is always kept in float32"),
    "--mem-size": (1, "training has no long-term memory of that size; --train-mem-size sets its own"),
    "--num-comb-shards": (1, "no shards of memories are combined in training"),
    "--dist": (1, "the original never read it"),
    "--temp": (1, "the original never read it"),
    "--probe": (1, "training searches no index"),
    "--dstore-size": (1, "training searches no datastore"),
    "--dstore-filename": (1, "training searches no datastore"),
    "--indexfile": (1, "training searches no datastore"),
    "--faiss-metric-type": (1, "training searches no datastore"),
    "--use-faiss-cpu": (0, "training searches no datastore"),
    "--knn-sim-func": (1, "training searches no datastore"),
    "--dstore-fp16": (0, "training searches no datastore"),
    "--no-load-keys": (0, "training searches no datastore"),
    "--move-dstore-to-mem": (0, "training searches no datastore"),
    "--lmbda": (1, "training searches no datastore"),
    "--k": (1, "training searches no datastore"),
}

EVALUATE: dict[str, tuple[int, str]] = COMMON | {
    "--criterion": (1, _TRAINING),
    "--optimizer": (1, _TRAINING),
    "--lr-scheduler": (1, _TRAINING),
    "--arch": (1, "the checkpoint knows its architecture"),
    "--momentum": (1, _TRAINING),
    "--weight-decay": (1, _TRAINING),
    "--wd": (1, _TRAINING),
    "--lr-shrink": (1, _TRAINING),
    "--warmup-updates": (1, _TRAINING),
    "--force-anneal": (1, _TRAINING),
    "--fa": (1, _TRAINING),
    "--ddp-backend": (1, _TRAINING),
}

# What training and its processes take; generate.py runs one process and writes no checkpoint.
_TRAINING_VALUES = (
    "--aim-repo --aim-run-hash --amp-batch-retries --amp-init-scale --amp-scale-window --batch-size-valid "
    "--beam-mt --best-checkpoint-metric --continue-once --curriculum --ddp-comm-hook --device-id "
    "--distributed-backend --distributed-init-method --distributed-num-procs --distributed-port "
    "--distributed-rank --distributed-world-size --finetune-from-model --fixed-validation-seed "
    "--heartbeat-timeout --keep-best-checkpoints --keep-interval-updates --keep-interval-updates-pattern "
    "--keep-last-epochs --lenpen-mt --local-rank --localsgd-frequency --max-len-a-mt --max-len-b-mt "
    "--max-sentences-valid --max-tokens-valid --max-valid-steps --nprocs-per-node --nval --optimizer-overrides "
    "--patience --pipeline-balance --pipeline-checkpoint --pipeline-chunks --pipeline-decoder-balance "
    "--pipeline-decoder-devices --pipeline-devices --pipeline-encoder-balance --pipeline-encoder-devices "
    "--plasma-path --restore-file --save-dir --save-interval --save-interval-updates --slowmo-base-algorithm "
    "--slowmo-momentum --train-subset --update-epoch-batch-itr --valid-subset --validate-after-updates "
    "--validate-interval --validate-interval-updates --zero-sharding"
).split()
_TRAINING_SWITCHES = (
    "--azureml-logging --combine-val --combine-valid-subsets --cpu-offload --disable-validation "
    "--distributed-no-spawn --fast-stat-sync --find-unused-parameters --fix-batches-to-gpus --fp32-reduce-scatter "
    "--gradient-as-bucket-view --grouped-shuffling --ignore-unused-valid-subsets "
    "--load-checkpoint-on-all-dp-ranks --maximize-best-checkpoint-metric --no-epoch-checkpoints "
    "--no-last-checkpoints --no-reshard-after-forward --no-save --no-save-optimizer-state "
    "--not-fsdp-flatten-parameters --on-cpu-convert-precision --profile --reset-dataloader --reset-logging "
    "--reset-lr-scheduler --reset-meters --reset-optimizer --save-async --suppress-crashes "
    "--update-ordered-indices-seed --use-plasma-view --use-sharded-state --write-checkpoints-asynchronously"
).split()

GENERATE: dict[str, tuple[int, str]] = {
    name: reason for name, reason in EVALUATE.items() if name not in ("--tokenizer", "--bpe", "--lm-eval")
} | {
    "--no-early-stop": (0, "a sentence ends when --beam hypotheses have ended"),
    "--no-beamable-mm": (0, "a source is always read once for all of its beams"),
    "--print-step": (0, "there is one step per token"),
    "--max-source-length": (1, "--max-source-positions is the limit"),
    "--sacrebleu-tokenizer": (1, "sacrebleu's own is taken, the signature names it"),
    "--num-batch-buckets": (1, "rows are padded to the longest one of their batch"),
    "--left-pad-target": (1, "targets are padded on the right"),
    "--decoder-embed-dim": (1, "the checkpoint and the datastore know their width"),
    "--required-seq-len-multiple": (1, "rows are padded to the longest one of their batch"),
    **{name: (1, _TRAINING_ALONE) for name in _TRAINING_VALUES},
    **{name: (0, _TRAINING_ALONE) for name in _TRAINING_SWITCHES},
}

PREPROCESS: dict[str, tuple[int, str]] = {
    name: value for name, value in (COMMON | EVALUATE).items() if name not in ("--dataset-impl", "--arch")
} | {
    "--task": (1, "binarised text is the same for every task"),
    "--cpu": (0, "no model runs"),
    "--fp16": (0, "no model runs"),
    "--memory-efficient-fp16": (0, "no model runs"),
    "--fp16-init-scale": (1, "no model runs"),
    "--seed": (1, "nothing is drawn"),
}

_NEXT_TOKEN = "is not offered: a language model predicts the next token here"
_PIPELINE = "is not offered: a model runs on one device per process"

_REJECTED: dict[str, str] = {
    "--output-dictionary-size": "is not offered: the output has the dictionary's types",
    "--self-target": _NEXT_TOKEN,
    "--future-target": _NEXT_TOKEN,
    "--past-target": _NEXT_TOKEN,
    "--truncate-sequence": "is not offered; --sample-break-mode none cuts long sentences",
}

_IN_TURN = "is not offered: decoders attend to their own text and to the source in turn"

REJECTED_TRAIN: dict[str, str] = _REJECTED | {
    "--upsample-primary": "is not offered; repeat the lines of the text before preprocess.py instead",
    "--load-alignments": "is not offered: no loss here reads word alignments",
    "--no-cross-attention": _IN_TURN,
    "--cross-self-attention": _IN_TURN,
    "--encoder-embed-path": "is not offered; --finetune-from-model starts with the weights of a checkpoint",
    "--decoder-embed-path": "is not offered; --finetune-from-model starts with the weights of a checkpoint",
    "--merge-src-tgt-embed": "is not offered; binarise with --joined-dictionary and give --share-all-embeddings",
    "--optimizer-overrides": "is not offered; give the optimizer's own flags, they win over the checkpoint's",
    "--ce-warmup-ratio": "is not offered: processes share memories, and each would have to draw alike; "
    "--ce-warmup-epoch trains whole epochs by cross-entropy",
    "--ignore-prefix-size": "is not offered: every token of a target counts; cut the prefix off before preprocess.py",
    "--tpu": "is not offered; train on CPUs or CUDA devices",
    "--amp": "is not offered; --fp16 and --bf16 are PyTorch's mixed precision here",
    "--model-parallel-size": _PIPELINE,
    "--quantization-config-path": "is not offered: models are trained in float32, float16 or bfloat16",
    "--validate-after-updates": "is not offered; --validate-interval-updates sets when to validate",
    "--pipeline-model-parallel": _PIPELINE,
    "--pipeline-balance": _PIPELINE,
    "--pipeline-devices": _PIPELINE,
    "--pipeline-chunks": _PIPELINE,
    "--pipeline-encoder-balance": _PIPELINE,
    "--pipeline-encoder-devices": _PIPELINE,
    "--pipeline-decoder-balance": _PIPELINE,
    "--pipeline-decoder-devices": _PIPELINE,
    "--pipeline-checkpoint": _PIPELINE,
    "--zero-sharding": "is not offered; --strategy deepspeed_stage_1 spreads the optimizer's states",
    "--continue-once": "is not offered; --restore-file names the checkpoint to start with",
    "--keep-interval-updates-pattern": "is not offered; --keep-interval-updates sets how many are kept",
    "--checkpoint-suffix": "is not offered; give each run a --save-dir",
    "--checkpoint-shard-count": "is not offered: a checkpoint in parts (--use-sharded-state) names them itself",
    "--no-bias-correction": "is not offered: PyTorch's Adamax always corrects the first updates",
    "--ema-seed-model": "is not offered: the average begins with the model's weights",
}

REJECTED_PREPROCESS: dict[str, str] = {
    "--align-suffix": "is not offered: word alignments are not binarised; leave it out",
    "--alignfile": "is not offered: word alignments are not binarised; leave it out",
}

REJECTED_EVALUATE: dict[str, str] = _REJECTED | {
    "--predefined-batches": "belongs to train.py",
    "--output-segments-to-file": "belongs to train.py",
    "--bisearch-l": "is not offered; fairseq-knn-sweep finds the best --lmbda",
    "--bisearch-r": "is not offered; fairseq-knn-sweep finds the best --lmbda",
    "--bisearch-step": "is not offered; fairseq-knn-sweep finds the best --lmbda",
}

_BEAMS = "is not offered; --sampling gives other texts than beam search"
_REFINED = "is not offered: models here write from left to right"

REJECTED_GENERATE: dict[str, str] = {
    "--constraints": "is not offered; --prefix-size begins texts with given words",
    "--diverse-beam-groups": _BEAMS,
    "--diverse-beam-strength": _BEAMS,
    "--diversity-rate": _BEAMS,
    "--lm-path": "is not offered; several models in --path are averaged",
    "--lm-weight": "is not offered; several models in --path are averaged",
    "--print-alignment": "is not offered: attention is not kept while generating",
    "--replace-unk": "is not offered; word pieces (--bpe) leave no unknown words",
    "--retain-dropout": "is not offered: models generate without dropout",
    "--iter-decode-eos-penalty": _REFINED,
    "--iter-decode-max-iter": _REFINED,
    "--iter-decode-force-max-iter": _REFINED,
    "--iter-decode-with-beam": _REFINED,
    "--iter-decode-with-external-reranker": _REFINED,
    "--retain-iter-history": _REFINED,
    "--decoding-format": _REFINED,
    "--model-parallel-size": _PIPELINE,
    "--pipeline-model-parallel": _PIPELINE,
    "--eos-token": "is not offered: texts end with the dictionary's </s>",
    "--retain-dropout-modules": "is not offered: models generate without dropout",
    "--quantization-config-path": "is not offered: models run in float32, float16 or bfloat16",
    "--tpu": "is not offered; generate on CPUs or CUDA devices",
    "--amp": "is not offered; --fp16 and --bf16 set the precision",
    "--checkpoint-suffix": "is not offered: a checkpoint is one file",
    "--checkpoint-shard-count": "is not offered: a checkpoint in parts (--use-sharded-state) names them itself",
    "--no-seed-provided": "is not offered; --seed sets the seed",
    "--upsample-primary": "belongs to training",
    "--load-alignments": "is not offered: word alignments are not read",
}
