"""Options of fairseq-datastore export-knn-targets. No torch here: the flags are made from these."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least, require_within
from fairseq.memory.sources.config import TEMPERATURES


@dataclass(frozen=True, kw_only=True)
class ExportTargetsConfig:
    """Write the neighbours' distribution at each token, which a small decoder is trained on (Memory Decoder)."""

    retrieval: str = flag("retrieval")
    """File of eval_lm.py --save-retrieval, of the text that the decoder is trained on."""
    out: str = flag("--out", default="")
    """Arrow stream to write, with a row for each token of the text."""
    num_neighbors: int | None = flag("--k", default=None)
    """Neighbours that count; by default all that were saved."""
    temperature: float | None = flag("--softmax-temp", "--knn-temp", default=None)
    """Divides their scores; by default what the retrieval was saved with."""
    dstore_filename: str | None = flag("--dstore-filename", default=None)
    """Datastore that was searched, if it has moved."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("give --out FILE: where the targets go")
        require_at_least(1, k=self.num_neighbors)
        if self.temperature is not None:
            require_within(*TEMPERATURES, between="_", softmax_temp=self.temperature)
