"""Options of a task: its data and how text is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least

BREAK_MODES = ("none", "complete", "complete_doc", "eos")


@dataclass(frozen=True, kw_only=True)
class LanguageModelingConfig:
    """Text as blocks for next-token prediction."""

    data: str = flag("data")
    """Folder made by preprocess.py; several separated by colons take turns by epoch."""
    sample_break_mode: str = flag("--sample-break-mode", default="none", choices=BREAK_MODES)
    """Permitted ends of blocks: anywhere, after whole sentences (within a document), or after every sentence."""
    tokens_per_sample: int = flag("--tokens-per-sample", default=1024)
    """Largest number of tokens in a block."""
    add_bos_token: bool = flag("--add-bos-token", default=False)
    """Begin each block with <s>."""
    max_target_positions: int | None = flag("--max-target-positions", default=None)
    """Longest input of the model; by default --tokens-per-sample."""

    def __post_init__(self) -> None:
        require_at_least(1, tokens_per_sample=self.tokens_per_sample, max_target_positions=self.max_target_positions)
