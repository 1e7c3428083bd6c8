"""Options of batches: sizes, and the training blocks that meet in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.config import flag, require_at_least


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """Options of the blocks that are trained on together; by default at random."""

    keep_order: bool = flag("--keep-order", default=False)
    """Fill batches with consecutive blocks of the text; epochs shuffle batches, not their blocks."""
    train_mem_size: int | None = flag("--train-mem-size", default=None)
    """Tokens of consecutive blocks that share a memory; n times --max-tokens spread over n processes."""
    predefined_batches: str | None = flag("--predefined-batches", default=None)
    """JSON list of block or sentence numbers, as bm25_make_batches.py writes it, to be cut into batches as it is."""
    output_segments_to_file: str | None = flag("--output-segments-to-file", default=None)
    """Write the text of the training blocks to this JSON file, for bm25_search.py, and exit."""
    output_samples_to_file: str | None = flag("--output-samples-to-file", default=None)
    """Write the target sentences of the training pairs to this JSON file, for bm25_search.py, and exit."""

    def __post_init__(self) -> None:
        if self.keep_order and self.predefined_batches:
            raise ValueError("--keep-order and --predefined-batches exclude each other; give one of them")
        if self.output_segments_to_file and self.output_samples_to_file:
            raise ValueError(
                "--output-segments-to-file is for language models and --output-samples-to-file for translation; give "
                "one of them"
            )
        require_at_least(1, train_mem_size=self.train_mem_size)
        if self.train_mem_size is not None and not self.keep_order and not self.predefined_batches:
            raise ValueError(
                f"--train-mem-size {self.train_mem_size} needs an order of the blocks that share a memory; add "
                "--keep-order (consecutive blocks) or --predefined-batches"
            )


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Options of batch sizes and data loading."""

    num_workers: int = flag("--num-workers", default=1)
    """Threads that prepare batches ahead; 0 prepares them in the main thread."""
    max_tokens: int | None = flag("--max-tokens", default=None)
    """Largest number of tokens in a batch, pads included; a context window comes on top."""
    max_sentences: int | None = flag("--max-sentences", "--batch-size", default=None)
    """Largest number of blocks in a batch."""
    required_batch_size_multiple: int = flag("--required-batch-size-multiple", default=8)
    """Batches of at least this many blocks hold a multiple of it."""
    skip_invalid_size_inputs_valid_test: bool = flag("--skip-invalid-size-inputs-valid-test", default=False)
    """Drop blocks longer than the model's positions from validation instead of raising an error."""

    def __post_init__(self) -> None:
        if self.max_tokens is None and self.max_sentences is None:
            raise ValueError(
                "neither --max-tokens nor --max-sentences sets the batch size; give --max-tokens or --max-sentences"
            )
        require_at_least(0, num_workers=self.num_workers)
        require_at_least(
            1,
            max_tokens=self.max_tokens,
            max_sentences=self.max_sentences,
            required_batch_size_multiple=self.required_batch_size_multiple,
        )


def with_default_batch(given: dict[str, Any]) -> dict[str, Any]:
    """The given options, with fairseq's 12,000 tokens a batch where neither tokens nor sentences are limited."""
    return given if {"max_tokens", "max_sentences"} & given.keys() else given | {"max_tokens": 12000}
