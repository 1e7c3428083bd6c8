"""lm-eval (the LM Evaluation Harness): choices, rolling log-likelihood and generated text of local tasks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tiny import (
    Check,
    difference,
    expected,
    expected_text,
    random_ids,
    target_logp,
    tiny_tokenizer,
    with_memory,
    words_of,
)

_CONTEXT, _CHOICE, _GENERATED = 9, 3, 5
_TASK = """\
task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
target_delimiter: " "
"""
_CHOICES = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
_ROLLING = "metric_list: [{metric: word_perplexity}]\n"
_UNTIL = f"generation_kwargs: {{until: ['</s>'], max_gen_toks: {_GENERATED}, do_sample: false}}\n"
_UNTIL += "metric_list: [{metric: exact_match}]\n"


def documents() -> list[dict[str, Any]]:
    """Questions with three answers of different lengths each."""
    found = []
    for number in range(5):
        context = words_of(random_ids(_CONTEXT + number, seed=100 + number))
        choices = [words_of(random_ids(1 + each, seed=200 + 10 * number + each)) for each in range(_CHOICE)]
        found.append({"context": context, "choices": choices, "answer": 0, "target": choices[2]})
    return found


def write_tasks(folder: Path) -> list[str]:
    """Write three tasks over the documents; returns their names."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    kinds = {
        "choices": ("multiple_choice", "answer", _CHOICES),
        "rolling": ("loglikelihood_rolling", '"{{context}}"', _ROLLING),
        "text": ("generate_until", "target", _UNTIL),
    }
    for name, (output_type, target, more) in kinds.items():
        text = _TASK.format(name=name, data=data, output_type=output_type, target=target) + more
        (folder / f"{name}.yaml").write_text(text)
    return [f"tiny_{name}" for name in kinds]


def run(kind: str, model: Any, store: Path) -> list[Check]:
    """Run the tasks with a batch of several questions, and compare every answer of the harness."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder, with_memory(kind, model, store):
        names = write_tasks(Path(folder))
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64, device="cpu")
        manager = TaskManager(include_path=folder, include_defaults=False)
        told = simple_evaluate(
            model=harness, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
        )
    given = {name: {sample["doc_id"]: sample["resps"] for sample in told["samples"][name]} for name in names}
    choices, rolling, texts = [], [], 0
    with torch.no_grad():
        for number, document in enumerate(documents()):
            context = tokenizer(document["context"], return_tensors="pt").input_ids[0]
            for each, answer in enumerate(document["choices"]):
                whole = torch.cat([context, tokenizer(answer, return_tensors="pt").input_ids[0]])
                logp = target_logp(expected(kind, model, store, whole), whole)[len(context) - 1 :].sum()
                choices.append(difference(float(given["tiny_choices"][number][each][0][0]), logp))
            after_first = torch.cat([torch.tensor([tokenizer.bos_token_id]), context])
            logp = target_logp(expected(kind, model, store, after_first), after_first).sum()
            rolling.append(difference(float(given["tiny_rolling"][number][0][0]), logp))
            ids = expected_text(kind, model, store, context, _GENERATED)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            texts += text.split() != given["tiny_text"][number][0][0].split()
    return [
        Check("log-likelihood of 15 answers", max(choices), 2e-4),
        Check("rolling log-likelihood of 5 texts", max(rolling), 2e-4),
        Check("texts of 5 that are others", texts, 0),
    ]
