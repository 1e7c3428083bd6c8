"""The datastore's settings that TRIME's translation programs take in --model-overrides, as our options.

Border code: the keys are those of adaptive kNN-MT's decoder (arXiv 2105.13022).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

# Key -> option it is.
_SAME = {
    "k": "num_neighbors",
    "probe": "probe",
    "dstore_filename": "dstore_filename",
    "dstore_size": "dstore_size",
    "dstore_fp16": "dstore_fp16",
    "no_load_keys": "no_load_keys",
    "move_dstore_to_mem": "move_dstore_to_mem",
    "knn_lambda_type": "knn_lambda_type",
    "knn_lambda_value": "weight",
    "knn_temperature_value": "temperature",
}
# Keys that are read below, and those whose default asks for nothing.
_READ = {"use_knn_datastore", "load_knn_datastore", "index_filename", "faiss_metric_type", "knn_sim_func"}
_READ |= {"use_gpu_to_search"}
_DEFAULTS: dict[str, Any] = {
    "only_use_max_idx": False,
    "knn_temperature_type": "fix",
    "knn_k_type": "fix",
    "max_k": None,
    "label_count_as_feature": False,
    "relative_label_count": False,
    "avg_k": False,
    "knn_lambda_net_hid_size": 0,
    "knn_temperature_net_hid_size": 0,
    "knn_k_net_hid_size": 0,
    "k_lambda_net_hid_size": 0,
    "knn_net_dropout_rate": 0.5,
    "knn_k_net_dropout_rate": 0,
    "k_lambda_net_dropout_rate": 0.0,
    "gumbel_softmax_temperature": 1,
    "only_train_knn_parameter": False,
}
_TRAIN = (
    "train a network with fairseq-train-combiner and give --knn-lambda-type adaptive --combiner FILE, or leave it out"
)
# Defaults of the decoder's own parser.
_ORIGINAL = {"num_neighbors": 8, "probe": 32, "weight": 0.5, "temperature": 10.0}


_NUMBERS: dict[str, type] = {
    "num_neighbors": int,
    "probe": int,
    "dstore_size": int,
    "weight": float,
    "temperature": float,
}


def _number(option: str, value: Any, kind: type) -> Any:
    """A setting as the number that it must be. Raises: ValueError naming its key."""
    key = next(key for key, name in _SAME.items() if name == option)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if not is_number or kind(value) != value:
        raise ValueError(f"--model-overrides: {key} {value!r} is not {'a whole' if kind is int else 'a'} number")
    return kind(value)


def split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the datastore, and the overrides that are the model's.

    The former are empty unless ``use_knn_datastore`` is set.
    Raises: ValueError for a setting that is not offered.
    """
    own = _SAME.keys() | _READ | _DEFAULTS.keys()
    rest = {name: value for name, value in overrides.items() if name not in own}
    given = {name: value for name, value in overrides.items() if name in own}
    if not given.get("use_knn_datastore"):
        return {}, rest
    if given.get("knn_lambda_type") not in (None, "fix", "trime"):
        raise ValueError(
            f"--model-overrides: knn_lambda_type {given['knn_lambda_type']!r} would need the networks in that "
            f"program's checkpoint; {_TRAIN}"
        )
    for name, default in _DEFAULTS.items():
        if given.get(name, default) not in (default, None):
            raise ValueError(f"--model-overrides: {name} {given[name]!r} is not offered; {_TRAIN}")
    options = _ORIGINAL | {_SAME[name]: value for name, value in given.items() if name in _SAME and value is not None}
    options |= {name: _number(name, options[name], kind) for name, kind in _NUMBERS.items() if name in options}
    by_distance = given.get("knn_sim_func") == "do_not_recomp_l2" or given.get("faiss_metric_type") == "l2"
    options |= {"knnmt": True, "faiss_metric_type": "l2" if by_distance else "ip"}
    if given.get("knn_sim_func") is not None:
        options["knn_sim_func"] = given["knn_sim_func"]
    elif not by_distance:
        options["no_load_keys"] = True  # the index's own products, as the programs take them
    if not given.get("use_gpu_to_search"):
        options["use_faiss_cpu"] = True
    index = given.get("index_filename")
    if index:
        options["indexfile"] = os.path.join(str(options.get("dstore_filename", "")), str(index))
    else:  # the keys themselves are searched, whose scores are exact
        options = {name: value for name, value in options.items() if name not in ("no_load_keys", "knn_sim_func")}
    return options, rest
