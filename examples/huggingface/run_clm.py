"""Train and evaluate causal language models of Hugging Face, alone or with a datastore (kNN-LM, RetoMaton).

    python run_clm.py --model_name_or_path MODEL --validation_file valid.txt --do_eval --output_dir out

README.md beside this file goes through the steps: train, save a datastore, build its index, cluster it, evaluate.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import clm_data
import clm_memory
import numpy as np
import torch
import transformers
from clm_arguments import DataArguments, ModelArguments, parse
from clm_training import Blocks, train
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from fairseq.evaluation.outputs import print_report
from fairseq.hf.knn.evaluation import TokenScores, evaluate
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.metrics.perplexity import Figures
from fairseq.runtime.atomic_files import require_writable, writing
from fairseq.runtime.files import read_json, write_json
from fairseq.runtime.manifest import write_manifest
from fairseq_cli.entry import run

logger = logging.getLogger("run_clm")


def main(argv: Sequence[str]) -> None:
    """Do what the flags ask for, in the order train, save, index, cluster, evaluate."""
    chosen, data, knn, training = parse(argv)
    if not (training.do_train or training.do_eval or knn.makes_memory):
        raise ValueError(
            "nothing to do: give --do_train, --do_eval, --save_knnlm_dstore, --build_index, --cluster_dstore"
        )
    data.check_files()
    if data.save_scores:
        require_writable(os.path.dirname(os.path.abspath(data.save_scores)), "--save_scores")
    require_writable(str(training.output_dir), "--output_dir")
    set_seed(training.seed)
    config, tokenizer = load_config(chosen), load_tokenizer(chosen)
    size = clm_data.window_size(data.block_size, config, tokenizer)
    stride = clm_data.window_stride(data, size, saving=knn.save_knnlm_dstore)
    clm_memory.check_store(config, knn)
    groups = texts(data, tokenizer, training, reads_subset=training.do_eval or knn.save_knnlm_dstore)
    model = None
    if training.do_train or groups.get("subset") is not None:
        model = load_model(chosen, config, tokenizer)
    if training.do_train:
        validation = Blocks(groups["validation"], size, None, tails=True) if "validation" in groups else None
        blocks = Blocks(groups["train"], size, data.max_train_samples, tails=not data.drop_group_tails)
        train(model, tokenizer, training, blocks, validation)
    if training.process_index != 0:  # under torchrun, the others have done their part
        return
    windows = clm_data.windows(groups.get("subset", ()), size, stride, data)
    if knn.save_knnlm_dstore:
        with evaluating(model, training):
            prefix, rows = clm_memory.save(model, tokenizer, windows, knn, training.per_device_eval_batch_size)
        sys.stdout.write(f"saved {rows} keys to {prefix}\n")
    if knn.build_index:
        built = clm_memory.index(config, knn)
        sys.stdout.write(f"built {built.path} over {built.rows} keys\n")
    if knn.cluster_dstore:
        made = clm_memory.cluster(config, knn)
        sys.stdout.write(f"made {made.num_clusters} clusters of {made.rows} keys: {made.path}\n")
    if training.do_eval and not knn.save_knnlm_dstore:
        memory = clm_memory.wrapper(knn, tokenizer)
        with evaluating(model, training), memory(model) if memory else contextlib.nullcontext():
            scores = evaluate(model, windows, memory, batch_size=training.per_device_eval_batch_size)
        told = report(scores, sum(map(len, groups["subset"])), memory, data, training)
        write_manifest(
            Path(str(training.output_dir)) / "eval.run.json",
            program="run_clm.py",
            argv=argv,
            config={"model": asdict(chosen), "data": asdict(data), "memory": asdict(knn)},
            figures=told,
            inputs=[path for path in data.files().values() if path],
            seed=training.seed,
        )


def load_config(chosen: ModelArguments) -> Any:
    """The model's config. Raises: ValueError when there is no such model."""
    with naming_model(chosen.config_name or chosen.model_name_or_path):
        return AutoConfig.from_pretrained(chosen.config_name or chosen.model_name_or_path, **hub(chosen))


def load_tokenizer(chosen: ModelArguments) -> Any:
    """The tokenizer. Raises: ValueError when there is none."""
    with naming_model(chosen.tokenizer_name or chosen.model_name_or_path):
        return AutoTokenizer.from_pretrained(chosen.tokenizer_name or chosen.model_name_or_path, **hub(chosen))


def load_model(chosen: ModelArguments, config: Any, tokenizer: Any) -> Any:
    """The model, fresh if only its config was named. Raises: ValueError when tokenizer and model do not fit."""
    if chosen.model_name_or_path is None:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=chosen.trust_remote_code)
    else:
        with naming_model(chosen.model_name_or_path):
            model = AutoModelForCausalLM.from_pretrained(
                chosen.model_name_or_path, config=config, dtype=chosen.dtype, **hub(chosen)
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")
    return model


def hub(chosen: ModelArguments) -> dict[str, Any]:
    """How something is had from the hub."""
    names = ("cache_dir", "trust_remote_code")
    return {name: getattr(chosen, name) for name in names} | {"revision": chosen.model_revision}


@contextlib.contextmanager
def naming_model(name: str | None) -> Iterator[None]:
    """Say in one line that a model cannot be had."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder of a model, and it cannot be had from the hub: {reason}") from error
    except ValueError as error:  # an encoder, say; the lines that follow name all models there are
        raise ValueError(f"{name} is no causal language model: {str(error).strip().splitlines()[0]}") from error


def texts(
    data: DataArguments, tokenizer: Any, training: TrainingArguments, *, reads_subset: bool
) -> dict[str, list[Tensor]]:
    """The tokens that are needed: ``train`` and ``validation`` for training, ``subset`` to evaluate or save."""
    wanted = {}
    if training.do_train:
        wanted["train"] = clm_data.train_lines(data)
        if training.eval_strategy != "no":
            wanted["validation"] = clm_data.read_lines(data, "validation")
    if reads_subset:
        wanted["subset"] = clm_data.read_lines(data, data.eval_subset)
    groups = {name: clm_data.tokenize(lines, tokenizer, data.lines_per_group) for name, lines in wanted.items()}
    for name, found in groups.items():
        logger.info("%s: %d tokens in %d groups", name, sum(map(len, found)), len(found))
    return groups


@contextlib.contextmanager
def evaluating(model: Any, training: TrainingArguments) -> Iterator[None]:
    """Put the model on its device for reading only, in the precision that was asked for."""
    if training.fp16_full_eval or training.bf16_full_eval:
        model.to(torch.float16 if training.fp16_full_eval else torch.bfloat16)
    model.to(training.device).eval()
    half = torch.float16 if training.fp16 else torch.bfloat16
    with torch.autocast(training.device.type, dtype=half, enabled=training.fp16 or training.bf16):
        yield


def report(
    scores: TokenScores, num_tokens: int, memory: Any, data: DataArguments, training: TrainingArguments
) -> dict[str, Any]:
    """Print the figures and leave them in the output folder; returns them."""
    logp = scores.logp.double().numpy()
    impossible = np.isneginf(logp)
    if impossible.any():
        logger.warning("%d tokens have probability 0 and are left out of the perplexity", impossible.sum())
    loss = -float(logp[~impossible].mean())
    counted = len(logp) - int(impossible.sum())
    figures = Figures(loss / math.log(2), math.exp(loss), len(logp), counted, num_tokens, scores.seconds)
    print_report(figures)
    told = {name: value for name, value in figures.to_dict().items() if name != "buckets"}
    told |= {"subset": data.eval_subset, "eval_loss": loss}
    if isinstance(memory, RetomatonWrapper):
        told |= {"saved_share": memory.saved_share, "num_searched": memory.num_searched}
        sys.stdout.write(f"saved {100 * memory.saved_share:.2f}% of the searches\n")
    told |= {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if data.save_scores:
        Path(data.save_scores).parent.mkdir(parents=True, exist_ok=True)
        with writing(data.save_scores, binary=True) as file:
            np.savez(file, logprob=logp.astype(np.float32), target=scores.targets.numpy().astype(np.int32))
    everything = folder / "all_results.json"
    write_json(folder / "eval_results.json", told)
    write_json(everything, (read_json(everything) if everything.exists() else {}) | told)
    return told


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    run("run_clm.py", main)
