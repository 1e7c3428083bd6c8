"""Options that run_clm.py and run_translation.py share: model, text, memory; and the reader of command lines.

Flags are those of knn-transformers' scripts of these names; each is spelled with dashes or underscores.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from fairseq.config import require_at_least
from fairseq.memory.sources.config import check_search_on
from fairseq.registry import did_you_mean

logger = logging.getLogger(__name__)

# Flags of older scripts -> what they are called now.
_RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--knnlm_gpu": "--knn_gpu",
    "--torch_dtype": "--dtype",
}
# Flags that set nothing here -> whether they take a value, and why.
_IGNORED = {
    "--overwrite_output_dir": (
        False,
        "new results replace old ones, and training goes on from a checkpoint",
    ),
    "--overwrite_cache": (False, "nothing is cached between runs"),
    "--use_fast_tokenizer": (True, "transformers has no other tokenizers any more"),
    "--preprocessing_num_workers": (True, "the tokenizer uses all cores by itself"),
    "--low_cpu_mem_usage": (False, "weights are always loaded into place"),
    "--sortish_sampler": (True, "batches are made as they come"),
    "--pad_to_max_length": (True, "batches are padded to their longest text"),
    "--ignore_pad_token_for_loss": (True, "padding is never scored"),
}


def text(default: Any, told: str, **more: Any) -> Any:
    """A field with its help."""
    return dataclasses.field(default=default, metadata={"help": told} | more)


@dataclass(frozen=True)
class ModelArguments:
    """The language model."""

    model_name_or_path: str | None = text(None, "Folder of the model, or its name on the hub.")
    config_name: str | None = text(None, "Folder of a config.json: trains a model from scratch.")
    tokenizer_name: str | None = text(None, "Folder of the tokenizer, if it is not the model's.")
    cache_dir: str | None = text(None, "Where models from the hub are kept.")
    model_revision: str = text("main", "Revision of a model from the hub.")
    dtype: str = text("auto", "Type of the weights: auto (the file's), float32, bfloat16 or float16.")
    trust_remote_code: bool = text(False, "Run modelling code that comes with the model.")

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("give --model_name_or_path MODEL, or --config_name FOLDER to train one from scratch")
        if self.config_name is not None and self.tokenizer_name is None:
            raise ValueError("--config_name makes a fresh model; it needs --tokenizer_name, too")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype} is not auto, float32, bfloat16 or float16")


@dataclass(frozen=True)
class TextArguments:
    """Where text comes from, and how much of it is used."""

    train_file: str | None = text(None, "Text to train on or to save.")
    validation_file: str | None = text(None, "Text of the subset validation.")
    test_file: str | None = text(None, "Text of the subset test.")
    dataset_name: str | None = text(None, "Folder with a text per subset.")
    dataset_config_name: str | None = text(None, "Configuration of the data set; a folder within --dataset_name.")
    eval_subset: str = text("validation", "What is evaluated or saved: train, validation, test, or the data set's own.")
    max_train_samples: int | None = text(None, "Samples (windows or pairs) to train on, at most.")
    max_eval_samples: int | None = text(None, "Samples to evaluate or save, at most.")
    save_scores: str | None = text(None, "File (.npz) for logprob and target of each scored token, in order.")

    def __post_init__(self) -> None:
        require_at_least(1, between="_", max_train_samples=self.max_train_samples)
        require_at_least(1, between="_", max_eval_samples=self.max_eval_samples)
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("--dataset_config_name belongs to a --dataset_name, which is missing")

    def check_files(self) -> None:
        """Raise ValueError when there is no text, or not where it should be."""
        if self.dataset_name is None and not any(self.files().values()):
            raise ValueError("no text: give --train_file, --validation_file or --test_file, or --dataset_name")
        for name, given in self.files().items():
            for path in self.paths(given) if given is not None else ():
                if not Path(path).is_file():
                    raise ValueError(f"--{name}_file: no such file: {path}")

    def files(self) -> dict[str, str | None]:
        """Subset -> its file as it was given."""
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}

    def paths(self, given: str) -> tuple[str, ...]:
        """The files that the value of a flag stands for."""
        return (given,)

    def all_paths(self) -> list[str]:
        """The files of all subsets."""
        return [path for given in self.files().values() if given is not None for path in self.paths(given)]


@dataclass(frozen=True)
class KnnArguments:
    """The memory: saving, indexing, clustering and using it."""

    save_knnlm_dstore: bool = text(False, "Save a datastore of --eval_subset.")
    build_index: bool = text(False, "Build the index over the datastore.")
    cluster_dstore: bool = text(False, "Cluster the datastore's keys, for --retomaton.")
    knn: bool = text(False, "Evaluate with the k nearest neighbours (kNN-LM).")
    retomaton: bool = text(False, "Evaluate with the automaton over the datastore (RetoMaton).")
    dstore_dir: str | None = text(None, "Folder of the datastore and what is made of it, or the prefix of its files.")
    overwrite_dstore: bool = text(False, "Replace the complete datastore of another model that has the name.")
    dstore_size: int | None = text(None, "Rows of the datastore: checked, or chooses among several.")
    dimension: int | None = text(None, "Width of the keys: checked, or chooses among several.")
    k: int = text(1024, "Neighbours per token.")
    lmbda: float = text(0.25, "Share of the neighbours in the probability, 0 to 1.")
    knn_temp: float = text(1.0, "Divides the similarities before they become probabilities.")
    knn_keytype: str | None = text(
        None, "Where keys come from: last_ffn_input (default), last_ffn_output, final_hidden."
    )
    knn_sim_func: str | None = text(None, "Similarity: l2 (default), or dot for the inner product with the full keys.")
    knn_gpu: bool = text(True, "Mix the neighbours in on the model's device.")
    move_dstore_to_mem: bool = text(False, "Read the datastore into memory first.")
    no_load_keys: bool = text(False, "Never touch the full keys, which may then be missing.")
    recompute_dists: bool = text(False, "Compute distances from the full keys; the index's are those of its codes.")
    probe: int = text(32, "Lists of the index that a search visits.")
    search_on: str | None = text(None, "Search by Ray actors: ray on this machine, ray://HOST:PORT in a cluster.")
    search_workers: int | None = text(None, "Actors of --search_on; by default one for each shard or node.")
    min_knns: int = text(1, "RetoMaton: rows that must be at hand for a search to be saved.")
    max_knns: int = text(1024, "RetoMaton: rows that are at hand, at most.")
    no_pointer: bool = text(False, "RetoMaton: follow nothing, so that every token is searched.")
    retomaton_compat: bool = text(False, "RetoMaton: count as knn-transformers does (duplicates, one state per batch).")
    members: str | None = text(None, "RetoMaton: the clusters' file; by default beside the datastore.")
    num_clusters: int | None = text(None, "Clusters; by default one for 100 rows.")
    sample_size: int = text(20_000_000, "Keys that the clusters are learned from, at most.")
    ncentroids: int | None = text(None, "Lists of the index; by default 4096, or one for 100 rows if that is fewer.")
    code_size: int | None = text(None, "Bytes of a key in the index; by default 64, or the next divisor of the width.")
    num_keys_to_add_at_a_time: int = text(1_000_000, "Keys between two points where a killed build can go on.")

    def __post_init__(self) -> None:
        counts = ("k", "probe", "min_knns", "max_knns", "num_clusters", "sample_size", "ncentroids", "code_size")
        require_at_least(1, between="_", **{name: getattr(self, name) for name in counts})
        require_at_least(1, between="_", num_keys_to_add_at_a_time=self.num_keys_to_add_at_a_time)
        require_at_least(1, between="_", dstore_size=self.dstore_size, dimension=self.dimension)
        check_search_on(self.search_on, self.search_workers)
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(f"--lmbda {self.lmbda} is not in [0, 1]; 0 means the language model alone")
        if not 0.0 < self.knn_temp < math.inf:
            raise ValueError(f"--knn_temp {self.knn_temp} is not positive; 1 changes nothing")
        if self.knn and self.retomaton:
            raise ValueError("--knn and --retomaton exclude each other; leave one out")
        for flag in ("save_knnlm_dstore", "build_index", "cluster_dstore", "knn", "retomaton"):
            if getattr(self, flag) and self.dstore_dir is None:
                raise ValueError(f"--{flag} needs --dstore_dir, the folder of the datastore")
        if self.save_knnlm_dstore and self.uses_memory:
            used = "--knn" if self.knn else "--retomaton"
            raise ValueError(f"--save_knnlm_dstore saves --eval_subset; evaluate with {used} in a second command")

    @property
    def uses_memory(self) -> bool:
        """Whether the evaluation has a memory."""
        return self.knn or self.retomaton

    @property
    def makes_memory(self) -> bool:
        """Whether something of a memory is made."""
        return self.save_knnlm_dstore or self.build_index or self.cluster_dstore


class _Parser(HfArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_into(argv: Sequence[str], kinds: Sequence[type], program: str, description: str | None) -> tuple[Any, ...]:
    """Read a command line, or a .json file that holds the same. Raises: ValueError for a flag that is unknown."""
    parser = _Parser(kinds, prog=program, description=description, allow_abbrev=False)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    words = _without_ignored(argv)
    rest = parser.parse_known_args(words)[1]
    if rest:
        known = ["--" + field.name for kind in kinds for field in dataclasses.fields(kind)]
        name = rest[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
        what = f"unknown flag {rest[0]}" if rest[0].startswith("-") else f"unexpected argument {rest[0]!r}"
        raise ValueError(what + did_you_mean(name, known))
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


def _without_ignored(argv: Sequence[str]) -> list[str]:
    """The words with old names renewed and, after a warning, without flags that mean nothing here."""
    words, skipping = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        if name in _IGNORED:
            takes_value, reason = _IGNORED[name]
            logger.warning("%s is ignored: %s", name, reason)
            skipping = takes_value and not equals
        elif skipping and not word.startswith("--"):
            skipping = False
        else:
            skipping = False
            words.append(_RENAMED[name] + equals + value if name in _RENAMED else word)
    return words
