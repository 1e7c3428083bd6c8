"""The block size that --tokens-per-sample and --context-window mean, by the program that wrote the checkpoint."""

import pytest

from fairseq.evaluation.splits import block_size_for


@pytest.mark.parametrize(
    ("given", "trained", "context", "written_by", "scored"),
    [
        (None, 3072, 2560, "fairseq 0.9", 512),
        (512, 3072, 2560, "fairseq 0.9", 512),
        (64, 3072, 2560, "fairseq 0.9", 512),  # the flag is ignored there
        (64, 256, 0, "fairseq 0.9", 256),
        (512, 256, 400, "fairseq 0.12", 112),
        (256, 256, 192, "fairseq 0.12", 64),
        (64, 256, 0, "fairseq 0.12", 64),
        (None, 256, 192, "fairseq 0.12", 64),
        (512, 3072, 2560, "", 512),
        (64, 256, 192, "", 64),
        (256, 256, 192, "", 64),
        (8, 32, 24, "", 8),
    ],
)
def test_block_size(given, trained, context, written_by, scored):
    assert block_size_for(given, trained, context, written_by) == scored


def test_the_choice_is_said_in_one_line(caplog):
    caplog.set_level("INFO")
    for written_by in ("fairseq 0.9", "fairseq 0.12", ""):
        caplog.clear()
        block_size_for(200, 256, 192, written_by)
        assert len(caplog.records) == 1
        assert "--tokens-per-sample 200" in caplog.text


def test_nothing_left_to_score():
    with pytest.raises(ValueError, match="--context-window 256 leaves nothing of the model's 256 tokens"):
        block_size_for(None, 256, 256)
    with pytest.raises(ValueError, match="--tokens-per-sample 64 includes --context-window 192"):
        block_size_for(64, 256, 192, "fairseq 0.12")
