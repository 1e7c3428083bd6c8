"""A trained combiner on disk: the network's weights as safetensors, and a JSON file that says what they belong to.

The JSON file is written last and holds a mark of the weights, so that a pair of different runs is noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq.memory.combiners.config import KINDS
from fairseq.runtime.atomic_files import replacing
from fairseq.runtime.file_marks import MARK, differs, file_mark
from fairseq.runtime.files import read_json, write_json
from fairseq.runtime.records import (
    NUMBER,
    POSITIVE,
    TEXT,
    Fields,
    Nullable,
    is_sealed,
    one_of,
    require,
    seal,
)

if TYPE_CHECKING:
    from fairseq.memory.combiners.learned import ShareNetwork

logger = logging.getLogger(__name__)

FORMAT = "fairseq-memory combiner 1"
_FIX = "copy both files again, or train it again (fairseq-train-combiner)"
_MADE_FOR = Fields(
    {
        "kind": one_of(*KINDS),
        "k": POSITIVE,
        "temperature": NUMBER,
        "dim": POSITIVE,
        "hidden": POSITIVE,
        "key_tap": TEXT,
        "metric": one_of("l2", "ip", "cos"),
        "similarity": one_of("recompute", "index", "dot"),
        "model_digest": TEXT,
        "store_digest": Nullable(TEXT),
    }
)
_SIDECAR = Fields({"format": TEXT, "made_for": _MADE_FOR, "weights": MARK})


@dataclass(frozen=True)
class MadeFor:
    """What a network was trained for: with anything else its weights mean nothing."""

    kind: str
    k: int
    """Neighbours it reads."""
    temperature: float
    """Divides their scores."""
    dim: int
    """Width of the keys."""
    hidden: int
    """Width of its inner layer."""
    key_tap: str
    """Inner state of the model that is the key."""
    metric: str
    similarity: str
    """Origin of the scores, as ``KnnConfig.similarity`` has it."""
    model_digest: str
    store_digest: str | None
    """Identity of the datastore's content."""

    def build(self, dropout: float = 0.0) -> ShareNetwork:
        """A network of these sizes, not yet trained."""
        from fairseq.memory.combiners.adaptive import MetaK
        from fairseq.memory.combiners.kernel_smoothing import KernelSmoothing
        from fairseq.memory.combiners.robust import ConfidenceWeights

        made: dict[str, Any] = {"adaptive": MetaK, "kster": KernelSmoothing, "robust": ConfidenceWeights}
        network: ShareNetwork = made[self.kind](self.k, self.temperature, self.dim, self.hidden, dropout)
        return network

    def require(self, name: str, now: Mapping[str, Any], *, strict: bool) -> None:
        """Compare with the values of now.

        Another datastore is worth a warning: a network may serve a store of other text.

        Args:
            name: the combiner's file.
            now: values by field name.
            strict: another datastore is an error too.
        Raises: ValueError with both values and the way out.
        """
        for field, flag in _FLAGS.items():
            ours = getattr(self, field)
            if field in now and now[field] != ours:
                raise ValueError(
                    f"--combiner {name} was trained with {flag} {ours}, not {now[field]}; give {flag} {ours}"
                )
        for field, what, fix in (
            ("dim", "keys of width", "give the model and datastore it was trained with"),
            ("similarity", "similarities of kind", "give the --knn-sim-func or --no-load-keys of its training"),
            ("key_tap", "keys of", "give --knn-keytype, or a store of those keys"),
            ("model_digest", "model", "train it again with this model (fairseq-train-combiner)"),
            ("store_digest", "datastore", "train it again with this one (fairseq-train-combiner)"),
        ):
            ours, theirs = getattr(self, field), now.get(field)
            if theirs is None or ours is None or ours == theirs:
                continue
            short = [str(x)[-12:] if field.endswith("digest") else x for x in (ours, theirs)]
            text = f"--combiner {name} was trained for {what} {short[0]}, this is {short[1]}; {fix}"
            if field != "store_digest" or strict:
                raise ValueError(text)
            logger.warning("%s (--strict-model makes this an error)", text)


# Flags of the fields that a user may set.
_FLAGS = {
    "kind": "--knn-lambda-type",
    "k": "--k",
    "temperature": "--knn-temp",
    "metric": "--faiss-metric-type",
}


def sidecar_of(path: str | os.PathLike[str]) -> Path:
    """The JSON file beside the weights."""
    return Path(path).with_suffix(".json")


def save_combiner(network: ShareNetwork, made_for: MadeFor, path: str | os.PathLike[str]) -> None:
    """Write the weights and then their description; each appears whole or not at all."""
    from safetensors.torch import save_file

    held = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with replacing(path) as aside:
        save_file(held, aside, metadata={"format": FORMAT})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
    mark = file_mark(Path(path))
    write_json(sidecar_of(path), seal({"format": FORMAT, "made_for": asdict(made_for), "weights": mark}))


def read_made_for(path: str | os.PathLike[str]) -> MadeFor:
    """What a combiner was trained for, without its weights.

    Raises: ValueError naming the file when it is missing, damaged or of something else.
    """
    return MadeFor(**_read_sidecar(Path(path))["made_for"])


def load_combiner(path: str | os.PathLike[str]) -> tuple[ShareNetwork, MadeFor]:
    """The network, ready for use, and what it was trained for.

    Raises: ValueError naming the file when it is missing, damaged or of something else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content = _read_sidecar(Path(path))
    reason = differs(Path(path), content["weights"], whole=True)
    if reason is not None:
        raise ValueError(f"{path} is not what {sidecar_of(path)} describes ({reason}); {_FIX}")
    made_for = MadeFor(**content["made_for"])
    network = made_for.build()
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not hold the weights that its JSON file describes ({reason}); {_FIX}") from None
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite; {_FIX}")
    network.requires_grad_(False)
    return network.eval(), made_for


def _read_sidecar(path: Path) -> dict[str, Any]:
    side = sidecar_of(path)
    for file in (path, side):
        if not file.is_file():
            raise ValueError(f"--combiner: no file {file}; {_FIX}")
    content = read_json(side, _FIX)
    require(content, Fields({"format": TEXT}), str(side), _FIX)
    if content["format"] != FORMAT:
        raise ValueError(f"{side} says format {content['format']!r}, this release reads {FORMAT!r}; {_FIX}")
    require(content, _SIDECAR, str(side), _FIX)
    if is_sealed(content) is not True:
        raise ValueError(f"{side} is damaged: its checksum does not fit its content; {_FIX}")
    return content
