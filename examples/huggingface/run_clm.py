"""Train and evaluate causal language models of Hugging Face, alone or with a datastore (kNN-LM, RetoMaton).

    python run_clm.py --model_name_or_path MODEL --validation_file valid.txt --do_eval --output_dir out

README.md beside this file goes through the steps: train, save a datastore, build its index, cluster it, evaluate.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import clm_data
import script_memory
import transformers
from clm_arguments import DataArguments, parse
from clm_training import Blocks, Padding
from script_models import CAUSAL, evaluating, load_config, load_model, load_tokenizer
from script_results import (
    peak_memory,
    perplexity_figures,
    proof_figures,
    save_scores,
    search_figures,
    write_results,
    write_run,
)
from script_training import pad_id, train
from torch import Tensor
from transformers import TrainingArguments, set_seed

from fairseq.hf.knn.evaluation import evaluate
from fairseq.hf.knn.prove import prove
from fairseq.runtime.atomic_files import require_writable
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
    script_memory.begin(knn, training)
    set_seed(training.seed)
    config, tokenizer = load_config(chosen, CAUSAL), load_tokenizer(chosen, CAUSAL)
    size = clm_data.window_size(data.block_size, config, tokenizer)
    stride = clm_data.window_stride(data, size, saving=knn.save_knnlm_dstore)
    script_memory.check_store(config, knn)
    groups = texts(data, tokenizer, training, reads_subset=training.do_eval or knn.save_knnlm_dstore)
    model = None
    if training.do_train or groups.get("subset") is not None:
        model = load_model(chosen, config, tokenizer, CAUSAL)
    if training.do_train:
        validation = Blocks(groups["validation"], size, None, tails=True) if "validation" in groups else None
        blocks = Blocks(groups["train"], size, data.max_train_samples, tails=not data.drop_group_tails)
        train(model, tokenizer, training, blocks, validation, Padding(pad_id(tokenizer)))
    if training.process_index != 0:  # under torchrun, the others have done their part
        return
    windows = clm_data.windows(groups.get("subset", ()), size, stride, data)
    script_memory.make(model, config, tokenizer, windows, knn, training)
    if training.do_eval and not knn.save_knnlm_dstore:
        memory = script_memory.wrapper(knn, tokenizer)
        windows = list(windows) if data.prove else windows
        with evaluating(model, training), memory(model) if memory else contextlib.nullcontext():
            scores = evaluate(model, windows, memory, batch_size=training.per_device_eval_batch_size)
            proof = None
            if data.prove:
                proof = prove(model, windows, scores, memory, positions=data.prove, seed=training.seed)
        told = perplexity_figures(scores, sum(map(len, groups["subset"])), memory) | {"subset": data.eval_subset}
        told |= search_figures(memory) | peak_memory() | proof_figures(proof)
        if data.save_scores:
            save_scores(data.save_scores, scores)
        write_results("eval", told, training)
        write_run("eval", "run_clm.py", argv, (chosen, data, knn, training), told)


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


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    run("run_clm.py", main)
