"""A GGUF file as a folder that ``from_pretrained`` reads: weights unpacked to float32, tokenizer, chat template."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""The files that every converted folder holds."""

_EXTRA = "fairseq-memory[hf]"


def is_converted(folder: Path) -> bool:
    """True if the folder is a whole model; it gets its name last, so one missing file means another folder."""
    return all((folder / name).exists() for name in FILES)


def check_target(folder: Path) -> None:
    """Raise ValueError when a library is missing or the folder is in use: checks that need no download."""
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"reading a GGUF file needs the package {error.name}: pip install '{_EXTRA}'") from None
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a converted model; remove it or give another folder")


def convert_gguf(source: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files of a GGUF file into a new folder.

    The weights are stored in float32, in which the unpacked blocks of any GGUF type are exact. (Half of the bytes would
    do as well as the blocks themselves, but from_pretrained keeps a file's type, and half precision is slow on a CPU.)

    Raises: ValueError as :func:`check_target`, or when transformers cannot read the file.
    """
    check_target(folder)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        tokenizer, model = _read(source)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    logger.info("%s: %d parameters, %d tokens", folder, model.num_parameters(), len(tokenizer))


def _read(source: Path) -> tuple[Any, Any]:
    """The tokenizer, and the model with dense float32 weights. Raises: ValueError when the file cannot be read."""
    import torch
    import transformers

    # Releases that can keep a file's blocks have GgufConfig, which is set to unpack; those before it always unpack.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = _tokenizer(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32, **unpack
        )
    except (ValueError, LookupError, TypeError, NotImplementedError, struct.error) as error:
        raise ValueError(f"transformers {transformers.__version__} cannot read {source}: {error}") from error
    packed = [name for name, weight in model.named_parameters() if weight.dtype != torch.float32]
    if packed:
        raise ValueError(f"transformers {transformers.__version__} left {packed[0]} of {source} packed")
    return tokenizer, model


def _tokenizer(source: Path) -> Any:
    """The tokenizer with the splitting that the file names; transformers splits every byte-level BPE as GPT-2 does."""
    import gguf
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    field = gguf.GGUFReader(source).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # Digits stand alone, so that in "  7" both spaces are one token; GPT-2's rule gives one of them to the digit.
        splitting = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting)
    return tokenizer
