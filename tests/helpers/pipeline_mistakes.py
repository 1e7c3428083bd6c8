"""Mistakes in calls of examples/pipeline, and the messages they end in."""

from __future__ import annotations

from pathlib import Path

# mistake -> (stage, overrides, parts of the message); {base} is the folder of a finished run, {here} an empty one
MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "an unknown key": ("generate", ["knn.temprature=2"], ["unknown key knn.temprature", "'temperature'"]),
    "an unknown section": ("generate", ["knnn.k=2"], ["unknown key knnn", "'knn'"]),
    "a key of another section": ("generate", ["knn.seed=2"], ["unknown key knn.seed; it belongs to training.seed"]),
    "a missing key": ("generate", ["--config", "{here}/lacks.yaml"], ["knn.store_dir is missing"]),
    "another type": ("train", ["knn.k=many"], ["knn.k: 'many' is not a whole number"]),
    "a value out of range": ("train", ["knn.lambda=1.5"], ["knn.lambda must be at most 1.0, got 1.5"]),
    "two ZeRO stages": ("train", ["fabric.strategy=deepspeed_stage_3"], ["deepspeed_stage_3", "stage is 2"]),
    "no DeepSpeed": ("train", ["fabric.strategy=deepspeed"], ["DeepSpeed cannot be imported", "fabric.strategy=fsdp"]),
    "no GPU": ("train", ["fabric.accelerator=cuda"], ["fabric.accelerator cuda: there is no GPU here"]),
    "no object": ("generate", ["data.val_path={here}/list.jsonl"], ["list.jsonl:2: [1] is not an object"]),
    "no field": ("generate", ["data.val_path={here}/field.jsonl"], ["field.jsonl:1: no 'output'; it has 'input'"]),
    "no JSON": ("generate", ["data.val_path={here}/broken.jsonl"], ["broken.jsonl:1: not JSON"]),
    "no file": ("generate", ["data.val_path={here}/none.jsonl"], ["no such file", "none.jsonl"]),
    "not generated": ("train", ["data.dataset_dir={here}/none"], ["holds no finished data set; run generate.py"]),
    "other lengths": ("train", ["data.max_output_length=7"], ["was made with lengths [12, 9], now it is [12, 7]"]),
    "another run": ("train", ["training.learning_rate=1e-5"], ["training.learning_rate 0.004, now it is 1e-05"]),
    "long warmup": ("train", ["training.warmup_steps=99"], ["warmup_steps 99 is more than the 20 steps"]),
    "nothing trained": ("store", ["training.out_name={here}/none"], ["holds no checkpoint; run train.py"]),
    "another size": ("store", ["knn.store_size=7"], ["knn.store_size is 7 and the training pairs make", "235 rows"]),
    "another kind of model": ("eval", ["model.checkpoint={material}/gpt2"], ["model_type is gpt2", "is t5"]),
    "an untrained model": ("eval", ["model.checkpoint={material}/t5"], ["was saved with another model"]),
    "no store": ("eval", ["knn.store_dir={here}"], ["holds no finished datastore; run store.py"]),
    "no index": ("eval", ["knn.store_dir={here}/bare"], ["has no index; run store.py, or set knn.index to the kind"]),
    "another index": ("eval", ["knn.index=HNSW8"], ["has another index than knn.index HNSW8; run store.py"]),
    "an index in the way": ("eval", ["knn.index=exact"], ["knn.index is exact, and searches would use the index"]),
    "an unknown index": ("store", ["knn.index=flta"], ["unknown knn.index 'flta' (did you mean 'flat'?)"]),
    "an index of more rows": ("store", ["knn.index=ivfpq"], ["235 rows", "256; use knn.index flat"]),
    "no clusters": ("eval", ["knn.enable_retomaton=true"], ["has no clusters; run store.py with it"]),
    "half a pair": ("generate", ["data.val_path={here}/half.jsonl"], ["half.jsonl:1: 'output' holds half of a surr"]),
    "not UTF-8": ("generate", ["data.val_path={here}/latin.jsonl"], ["latin.jsonl:1: not JSON"]),
    "a large k": ("eval", ["knn.k=9999"], ["knn.k is 9999 and datastore", "has 235 rows"]),
    "another size of the store": ("eval", ["knn.store_size=7"], ["knn.store_size is 7 and datastore", "235 rows"]),
}


def write_mistakes(folder: Path) -> None:
    """Write the files with mistakes into a folder."""
    (folder / "list.jsonl").write_text('{"input": "e1", "output": "r1"}\n[1]\n')
    (folder / "field.jsonl").write_text('{"input": "e1"}\n')
    (folder / "lacks.yaml").write_text("knn:\n  k: 3\n")
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "half.jsonl").write_text('{"input": "e1", "output": "\\ud800"}\n')
    (folder / "latin.jsonl").write_bytes(b'{"input": "\xe9", "output": "r1"}\n')
