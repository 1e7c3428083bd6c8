"""Options of the commands of fairseq-datastore."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from fairseq.config import UnreadableError, flag, int_list, require_at_least

KEY_TYPES = ("float32", "float16", "bfloat16")

SAVES_TEXT = "eval_lm.py --save-knnlm-dstore"
"""Command that makes the store of a language model."""
SAVES_PAIRS = "save_datastore.py"
"""Command that makes the store of a translation model."""
SAVES_EITHER = f"{SAVES_TEXT} (a translation model: {SAVES_PAIRS})"


def row_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``3,10-20`` into pairs of first and last row. Raises: UnreadableError when it is anything else."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UnreadableError(f"{part!r} is not a row or range of rows; write for example 3,10-20")
        ranges.append((int(first), int(last) if dash else int(first)))
    return tuple(ranges)


def count(text: str) -> int:
    """Parse a whole number, which may be written ``103e6``. Raises: UnreadableError when it is anything else."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number != int(number):
        raise UnreadableError(f"{text!r} is not a whole number; write for example 250000 or 103e6")
    return int(number)


def codec_name(text: str) -> str:
    """A codec in faiss's spelling: ``PQ128``, or ``OPQ128,PQ128`` with a rotation. Raises: UnreadableError."""
    match = re.fullmatch(r"(?:OPQ(\d+)(?:_\d+)?,)?PQ([1-9]\d*)(?:x8)?", text)
    if match is None or match[1] not in (None, match[2]):
        raise UnreadableError(
            f"{text!r} is no codec; give PQ and the bytes of a code, with a rotation of the same bytes before it or "
            "without: OPQ128,PQ128 or PQ128"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Options that name a datastore."""

    prefix: str = flag("prefix")
    """Prefix of the files; for some other programs their folder."""
    dstore_size: int | None = flag("--dstore-size", default=None)
    """Rows; needed for files of other programs that do not state them."""
    dimension: int | None = flag("--dimension", default=None)
    """Width of the keys; needed for files of other programs that do not state them."""
    dstore_fp16: bool = flag("--dstore-fp16", default=False)
    """The keys are float16; our own stores record it."""
    dstore_bf16: bool = flag("--dstore-bf16", default=False)
    """The keys are bfloat16; our own stores record it."""

    def __post_init__(self) -> None:
        require_at_least(1, dstore_size=self.dstore_size, dimension=self.dimension)
        if self.dstore_fp16 and self.dstore_bf16:
            raise ValueError("--dstore-fp16 and --dstore-bf16 exclude each other; drop one of them")


@dataclass(frozen=True, kw_only=True)
class InfoConfig(StoreConfig):
    """Show the contents of a datastore."""

    json: bool = flag("--json", default=False)
    """Print a JSON object."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(StoreConfig):
    """Compare files of every kind with their checksums: datastores (whose keys that are not finite or all zeros are
    counted too), indexes, clusters, saved neighbours, memories, bm25 folders, binarised text and checkpoints."""

    more: tuple[str, ...] = flag("more", default=())
    """More prefixes, files or folders."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything to verify."""
        return (self.prefix, *self.more)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(StoreConfig):
    """Write a copy of a datastore: with keys of another type, in one file, or from files of another program."""

    out: str = flag("out")
    """Prefix of the new datastore."""
    dtype: str | None = flag("--dtype", default=None, choices=KEY_TYPES)
    """Type of the new keys; by default that of the old ones."""
    drop_nonfinite: bool = flag("--drop-nonfinite", default=False)
    """Drop rows whose key holds NaN or infinity in the new type, instead of raising an error."""
    knn_keytype: str | None = flag("--knn-keytype", default=None)
    """Inner state that the keys are, if the old files do not record it."""
    dictionary: str | None = flag("--dictionary", default=None)
    """Dictionary (dict.txt) of the values, if the old files do not record it."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Combine datastores into one without copying: the shards of one datastore, or any datastores."""

    prefix: str = flag("prefix")
    """Prefix of the combined datastore."""
    stores: tuple[str, ...] = flag("stores", default=())
    """Prefixes of the datastores to concatenate; without any, the shards PREFIX.partI-of-N are joined."""


@dataclass(frozen=True, kw_only=True)
class DeleteConfig:
    """Delete rows of a datastore: searches stop finding them at once; the arrays stay unchanged."""

    prefix: str = flag("prefix")
    """Prefix of the datastore."""
    rows: tuple[tuple[int, int], ...] = flag("--rows", default=(), parse=row_ranges)
    """Rows, such as 3,10-20."""
    rows_file: str | None = flag("--rows-file", default=None)
    """Text file of rows, separated by white space."""
    documents: tuple[int, ...] = flag("--documents", default=(), parse=int_list)
    """Documents, such as 3,7, with all of their rows."""
    compact: bool = flag("--compact", default=False)
    """Then rewrite the datastore without the deleted rows; its indexes must be built again."""
    generation: int | None = flag("--generation", default=None)
    """Number of rewritings (--compact) that the row numbers count from, as fairseq-datastore info prints it; by default
    that of the present store, except that a command repeated after its --compact finds its work done."""

    def __post_init__(self) -> None:
        if not (self.rows or self.rows_file or self.documents or self.compact):
            raise ValueError(
                "nothing to do; give --rows, --rows-file or --documents to delete, or --compact to rewrite"
            )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Report versions, processor, search paths, disk and compiled kernels, and what will be slow here and why."""

    folder: str = flag("--folder", default=".")
    """Folder on the disk of your datastores, whose speed is measured."""
    warm: bool = flag("--warm", default=False)
    """Only compile the kernels that are not, so that no search has to wait for it."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(StoreConfig):
    """Write a datastore of some rows, drawn at random."""

    out: str = flag("out")
    """Prefix of the new datastore."""
    rows: int = flag("--rows")
    """Number of rows."""
    seed: int = flag("--seed", default=1)
    """Seed of the random choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, rows=self.rows)
        require_at_least(0, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(StoreConfig):
    """Train a product quantizer on a sample of the keys and write the codes of all: GNN-LM's features in few bytes."""

    out: str = flag("out")
    """File of the codes, such as stores/train.codes.npy."""
    codec: str | None = flag("--codec", default=None, parse=codec_name)
    """Codec as faiss spells it, such as OPQ128,PQ128: bytes of a code, and whether a rotation is learned before it; by
    default a rotation, and a byte for 8 numbers."""
    codec_file: str | None = flag("--codec-file", default=None)
    """File of the trained codec, which is used if it is there; by default OUT.codec."""
    sample: int = flag("--sample", default=65_536, parse=count)
    """Keys the codec is trained on, drawn at random; faiss uses no more than the default."""
    held_out: int = flag("--held-out", default=10_000, parse=count)
    """Other keys, on which the error is measured; a tenth of the store at most."""
    seed: int = flag("--seed", default=1)
    """Seed of the choice and of the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, held_out=self.held_out, sample=self.sample)
        require_at_least(0, seed=self.seed)

    @property
    def codec_path(self) -> str:
        """File of the codec."""
        return self.codec_file or f"{self.out}.codec"

    def codec_of(self, dim: int) -> tuple[int, bool]:
        """Bytes of a code, and whether a rotation is learned, for keys of a width.

        Raises: ValueError when the codec changes the width.
        """
        if self.codec is None:
            return max(1, dim // 8), True
        rotation, _, quantizer = self.codec.rpartition(",")
        width = rotation.partition("_")[2]
        if width and int(width) != dim:
            raise ValueError(
                f"--codec {self.codec} changes the width of the keys from {dim} to {width}, and features keep theirs; "
                f"give {rotation.partition('_')[0]},{quantizer}"
            )
        return int(quantizer.removeprefix("PQ").removesuffix("x8")), bool(rotation)
