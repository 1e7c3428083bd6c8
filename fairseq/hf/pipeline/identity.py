"""What else than weights and text the figures of a run follow from: digests for the records that its stages keep."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fairseq.runtime.manifest import file_digest

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_SHOWN = 16
# What saving a model changes although it computes the same.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash", "_from_model_config"}


def config_digest(config: Any) -> str:
    """Digest of what config.json or generation_config.json sets apart from defaults."""
    return _digest(json.dumps(_settings(config.to_diff_dict()), sort_keys=True, default=str))


def weights_digest(name: str, config: Any) -> str:
    """Digest of the files of a model's weights; of a model from the hub, its commit.

    Args:
        name: folder, file or name of the model.
        config: its config.
    """
    place = Path(name)
    files = [place] if place.is_file() else sorted(path for pattern in _WEIGHTS for path in place.glob(pattern))
    commit = getattr(config, "_commit_hash", None)
    if not files and commit is not None:
        return str(commit)
    return _digest(repr([(path.name, file_digest(path)) for path in files]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _settings(each) for name, each in value.items() if name not in _VOLATILE}
    return value
