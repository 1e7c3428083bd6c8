"""A file in the place of a part of a checkpoint, or of its parts' tensors, is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.checkpoints.parts import index_entry, join_parts, write_part

WHOLE = torch.arange(6.0).view(3, 2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one spread tensor in two parts."""
    for rank, rows in enumerate((WHOLE[:2], WHOLE[2:])):
        write_part(str(tmp_path), "one", rank, [rows])
    index = index_entry("one", 2, [["model", "weight"]], [[3, 2]])
    torch.save({"model": {"weight": None}, **index}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"weight": WHOLE}},
        WHOLE,
        {"state": "one", "rank": 1, "tensors": []},
        {"state": "one", "rank": 1, "tensors": {"weight": WHOLE}},
    ],
    ids=["a whole checkpoint", "a tensor", "a part without tensors", "named tensors"],
)
def test_another_file_in_the_place_of_a_part_is_named(checkpoint: Path, other: Any) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert torch.equal(join_parts(str(checkpoint), content, whole=True)["model"]["weight"], WHOLE)
    part = checkpoint.parent / "checkpoint_parts" / "one" / "part1.pt"
    torch.save(other, part)
    message = f"{part} is no part of a checkpoint with 1 spread tensors; copy the folder checkpoint_parts together"
    with pytest.raises(ValueError, match=re.escape(message)):
        join_parts(str(checkpoint), torch.load(checkpoint, weights_only=True), whole=False)
