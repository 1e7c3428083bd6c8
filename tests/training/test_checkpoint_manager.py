"""Names, links and pruning of checkpoint files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq.training.checkpoint_manager import CheckpointManager
from fairseq.training.config import CheckpointConfig


def keeper(folder: Path, **settings: object) -> CheckpointManager:
    made = CheckpointManager(CheckpointConfig(save_dir=str(folder), **settings))  # type: ignore[arg-type]
    made.prepare()
    return made


def write(kept: CheckpointManager, epoch: int, update: int, figure: float | None, end: bool = True) -> list[str]:
    better = kept.note(figure)
    names = kept.names(epoch=epoch, update=update, end_of_epoch=end, better=better, figure=figure)
    if names:
        kept.write(names, lambda path: save(path, f"{epoch} {update}"))
    return names


def save(path: str, text: str) -> None:
    """As save_checkpoint does: a new file takes the name."""
    aside = Path(path + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_last_gets_its_name_after_all_others(tmp_path: Path) -> None:
    names = write(keeper(tmp_path), 1, 10, 5.0)
    assert names == ["checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert files(tmp_path) == set(names)


def test_best_stays_when_a_later_epoch_is_worse(tmp_path: Path) -> None:
    kept = keeper(tmp_path, no_epoch_checkpoints=True)
    write(kept, 1, 10, 5.0)
    write(kept, 2, 20, 6.0)
    assert (tmp_path / "checkpoint_best.pt").read_text() == "1 10"
    assert (tmp_path / "checkpoint_last.pt").read_text() == "2 20"
    assert files(tmp_path) == {"checkpoint_best.pt", "checkpoint_last.pt"}


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep_last_epochs=2, keep_interval_updates=1, save_interval_updates=5)
    for epoch in range(1, 5):
        write(kept, epoch, epoch * 10 - 5, None, end=False)
        write(kept, epoch, epoch * 10, None)
    assert files(tmp_path) == {"checkpoint3.pt", "checkpoint4.pt", "checkpoint_4_40.pt", "checkpoint_last.pt"}


@pytest.mark.parametrize(("maximize", "left"), [(False, {"1.0000", "2.0000"}), (True, {"4.0000", "3.0000"})])
def test_the_best_few_are_kept(tmp_path: Path, maximize: bool, left: set[str]) -> None:
    kept = keeper(
        tmp_path, keep_best_checkpoints=2, maximize_best_checkpoint_metric=maximize, no_epoch_checkpoints=True
    )
    for epoch, figure in enumerate((3.0, 1.0, 4.0, 2.0), 1):
        write(kept, epoch, epoch, figure)
    assert {name[len("checkpoint.best_loss_") : -3] for name in files(tmp_path) if "best_loss" in name} == left


def test_patience_counts_validations_without_a_better_figure(tmp_path: Path) -> None:
    kept = keeper(tmp_path, patience=2)
    for figure, out in ((5.0, False), (6.0, False), (4.0, False), (4.5, False), (4.0, True)):
        kept.note(figure)
        assert kept.out_of_patience is out


def test_state_goes_on(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    first.note(5.0)
    second = keeper(tmp_path)
    second.load_state_dict(first.state_dict())
    assert not second.note(5.5)


def test_a_restore_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert keeper(tmp_path).restore_path() is None
    with pytest.raises(ValueError, match="does not exist"):
        keeper(tmp_path, restore_file="checkpoint7.pt").restore_path()


def test_no_save_writes_nothing(tmp_path: Path) -> None:
    assert write(keeper(tmp_path / "none", no_save=True), 1, 1, 1.0) == []
    assert not (tmp_path / "none").exists()


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    write(keeper(tmp_path), 1, 10, 5.0)
    kept = files(tmp_path)
    for leftover in ("checkpoint_1_5.pt.some-host-7.tmp", "checkpoint_best.pt.tmp"):
        (tmp_path / leftover).touch()
    keeper(tmp_path)
    assert files(tmp_path) == kept
