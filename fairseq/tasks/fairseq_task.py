"""The members of a task that fairseq's scripts and plug-ins know, in terms of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary


class FairseqTask:
    """A task with fairseq's names: ``args``, ``datasets``, ``load_dataset``, the dictionaries."""

    dictionary: Dictionary
    source: Dictionary | None = None
    """Dictionary of the source that is translated; None where there is one text."""

    def __init__(self, config: Any) -> None:
        self.args = self.cfg = config
        self.datasets: dict[str, Any] = {}

    @classmethod
    def setup_task(cls, config: Any, **more: Any) -> Any:
        """The task of these options."""
        return cls(config, **more)

    @property
    def source_dictionary(self) -> Dictionary:
        """Dictionary of the inputs."""
        return self.source or self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """Dictionary of the targets; without a source it is the same."""
        return self.dictionary

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **more: Any) -> None:
        """Read a split, which :meth:`dataset` then returns. Raises: ValueError when there is none."""
        self.datasets[split] = self.read_split(split, epoch, combine)

    def read_split(self, split: str, epoch: int, combine: bool) -> Any:
        """The blocks of a split; tasks give this."""
        raise NotImplementedError

    def dataset(self, split: str) -> Any:
        """A split that was read. Raises: KeyError when it was not."""
        if split not in self.datasets:
            raise KeyError(f"split {split!r} is not loaded; call load_dataset({split!r}) first")
        return self.datasets[split]


LegacyFairseqTask = FairseqTask
