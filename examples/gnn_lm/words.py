"""What follows each neighbour, as features: python examples/gnn_lm/words.py STORE CHECKPOINT OUT

A datastore's key at row j predicts token j; the token is known there, and only the state after it has read it. OUT is a
datastore with the same rows whose key j is what the output layer of CHECKPOINT multiplies a state with for token j
itself, at the scale of a normalised state: a neighbour's answer in the space of the answers (--graph-features OUT).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.checkpoint_utils import load_checkpoint
from fairseq.config import FlagParser, build, flag
from fairseq.memory.datastore import Datastore, DatastoreWriter

BULK = 1 << 16
HEAD, TAIL = "decoder.adaptive_softmax.head", "decoder.adaptive_softmax.tail"


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Options of the features."""

    places: tuple[str, ...] = flag("places")
    """Prefix of the datastore, the language model's checkpoint, and the prefix to write."""

    def __post_init__(self) -> None:
        if len(self.places) != 3:
            raise ValueError(f"{len(self.places)} places are named; give a datastore, a checkpoint and what to write")


def output_vectors(weights: Mapping[str, Tensor]) -> Tensor:
    """What the adaptive softmax multiplies a state with for each type, (V, D): its row of the head, or, of a tail, its
    row through the tail's projection and the tail's own row of the head. Raises: ValueError without such weights.
    """
    if f"{HEAD}.word_proj.weight" not in weights:
        raise ValueError("the checkpoint has no adaptive softmax that is tied to an adaptive input")
    parts = [weights[f"{HEAD}.word_proj.weight"].float()]
    for tail, own_D in enumerate(weights[f"{HEAD}.class_proj.weight"].float()):
        row_VC, project_CD = (weights[f"{TAIL}.{tail}.{part}.weight"].float() for part in (2, 0))
        parts.append(row_VC @ project_CD + own_D)
    return torch.cat(parts)


def main(argv: Sequence[str]) -> None:
    """Write the datastore."""
    parser = FlagParser("words.py", "What follows each neighbour, as features.")
    parser.add_config(WordsConfig)
    prefix, checkpoint, out = build(WordsConfig, parser.parse(argv)).places
    store = Datastore.open(prefix)
    vector_VD = output_vectors(load_checkpoint(checkpoint).model)
    if len(vector_VD) < store.metadata["dictionary_size"]:
        raise ValueError(f"{checkpoint} has {len(vector_VD)} types, {prefix} {store.metadata['dictionary_size']}")
    vector_VD = torch.nn.functional.normalize(vector_VD, dim=1) * vector_VD.shape[1] ** 0.5
    metadata = {name: value for name, value in store.metadata.items() if name.startswith(("dictionary_", "model_"))}
    with DatastoreWriter(
        out, len(store), vector_VD.shape[1], "float16", metadata | {"key_tap": "output_vector"}
    ) as writer:
        for start in range(writer.rows_done, len(store), BULK):
            value_N = store.values.take(torch.arange(start, min(start + BULK, len(store)))).long()
            writer.append(vector_VD[value_N].half(), value_N)
        writer.finish()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"words.py: error: {error}\n")
        sys.exit(2)
