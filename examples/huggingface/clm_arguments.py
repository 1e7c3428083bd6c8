"""Options of run_clm.py: model, text, memory, and Hugging Face's own TrainingArguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from script_arguments import KnnArguments, ModelArguments, TextArguments, parse_into, text
from transformers import TrainingArguments

from fairseq.config import require_at_least
from fairseq.memory.proof.config import ProofConfig


@dataclass(frozen=True)
class DataArguments(TextArguments):
    """The text, and how it is cut."""

    train_file: str | None = text(None, "Text to train on or to save: .txt, or .jsonl or .csv with a column text.")
    dataset_name: str | None = text(
        None,
        "Folder with a text file per subset (train.txt, validation.txt, wiki.test.tokens, ...), or a name on the hub.",
    )
    validation_split_percentage: int = text(5, "Share of train that is held out where there is no validation text.")
    keep_linebreaks: bool = text(True, "Keep the newline at the end of each line of a .txt file.")
    block_size: int | None = text(None, "Tokens of a window; by default what the model reads, at most 1024.")
    stride: int | None = text(
        None,
        "Tokens from one window to the next; each window ends with the tokens it scores. By default half "
        "of --block_size, so that at least as many tokens are read before each; --block_size while saving a datastore.",
    )
    lines_per_group: int = text(1000, "Lines that are one text: no window reaches over a group's end.")
    prove: str | None = text(
        None,
        "Check at some positions that the probabilities sum to 1, that later tokens change no score, and that the "
        "datastore neither grew nor holds the text: a number of positions, or all; without a value as many as cost "
        "less than 2% of the time.",
        nargs="?",
        const="sample",
    )
    drop_group_tails: bool = text(False, "Leave out the end of a group that fills no window, as knn-transformers does.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, between="_", lines_per_group=self.lines_per_group, stride=self.stride)
        require_at_least(2, between="_", block_size=self.block_size)
        ProofConfig(prove=self.prove)  # rejects what is neither
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage} is not in 1 to 99")


def parse(
    argv: Sequence[str], program: str = "run_clm.py"
) -> tuple[ModelArguments, DataArguments, KnnArguments, TrainingArguments]:
    """Read a command line, or a .json file that holds the same. Raises: ValueError for a flag that is unknown."""
    kinds = (ModelArguments, DataArguments, KnnArguments, TrainingArguments)
    return parse_into(argv, kinds, program, __doc__)  # type: ignore[return-value]
