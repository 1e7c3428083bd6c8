"""Losses in fairseq's form (``register_criterion("name")`` with ``add_args`` or a dataclass) as losses of ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fairseq.compat.flags import config_of, namespace
from fairseq.compat.logging import metrics
from fairseq.compat.samples import FairseqModel, Sample, as_sample
from fairseq.criterions.base import Criterion, Loss
from fairseq.criterions.configs import CriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import smoothed_nll
from fairseq.metrics.training import Figures, loss_figures
from fairseq.registry import Entry

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.models.base import LanguageModel
    from fairseq.models.transformer_lm import TransformerLanguageModel

_COUNTS = ("loss", "sample_size", "ntokens", "nsentences")


class FairseqCriterion(nn.Module):
    """A loss in fairseq's form: ``forward(model, sample)`` gives (sum of the loss, sample size, figures to log)."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task
        dictionary = getattr(task, "target_dictionary", None)
        self.padding_idx = dictionary.pad() if dictionary is not None else -100

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the loss's options to a parser."""

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> FairseqCriterion:
        """Make the loss: options go to the parameters of ``__init__`` that have their names."""
        given = {"task": task, "args": cfg, "cfg": cfg, "config": cfg}
        found = {}
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name in ("self", "kwargs") or parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if name in given:
                found[name] = given[name]
            elif hasattr(cfg, name):
                found[name] = getattr(cfg, name)
            elif parameter.default is parameter.empty:
                raise ValueError(f"{cls.__name__} needs {name!r}, which no option of it gives; add it in add_args")
        return cls(**found)

    def forward(self, model: Any, sample: Sample, reduce: bool = True) -> tuple[Tensor, float, dict[str, Any]]:
        """Loss of a sample."""
        raise NotImplementedError

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log figures of summed outputs with ``metrics.log_scalar``; by default ours are reported."""

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Always summed here."""
        return True


class LegacyFairseqCriterion(FairseqCriterion):
    """A loss whose ``__init__`` takes (args, task)."""

    def __init__(self, config: Any, task: Any) -> None:
        super().__init__(task)
        self.args = self.cfg = config


class FairseqFormLoss(Criterion):
    """A loss of ours around one in fairseq's form, which is made as soon as the task is known."""

    def __init__(self, kind: type[FairseqCriterion], config: CriterionConfig) -> None:
        super().__init__(config)
        self.kind = kind
        self.pad = 0
        self.inner: FairseqCriterion | None = None

    def attach(self, task: Any) -> None:
        """Make the loss. Raises: ValueError when it has weights of its own, which no optimizer would train."""
        self.pad = task.target_dictionary.pad()
        self.inner = self.kind.build_criterion(namespace(self.config), task)
        if any(True for _ in self.inner.parameters()):
            raise ValueError(f"{self.kind.__name__} has weights of its own; put them into the model")

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """See the class."""
        assert self.inner is not None, "attach() was not called"
        self.inner.train(model.training)
        shown = FairseqModel(cast("TransformerLanguageModel", model))
        total, sample_size, log = self.inner(shown, as_sample(batch, self.pad))
        counts = {"loss": total.detach(), "sample_size": sample_size, "ntokens": batch.num_scored}
        counts["nsentences"] = len(batch.ids_B)
        return Loss(total, int(sample_size), counts | {name: _number(value, name) for name, value in log.items()})

    def figures(self, sums: Mapping[str, float]) -> Figures:
        """Ours, with those over them that ``reduce_metrics`` logs."""
        found = loss_figures(sums)
        output = dict(sums) | {"ntokens": sums["num_tokens"], "nsentences": sums["num_sentences"]}
        with metrics.aggregate(new_root=True) as meters:
            self.kind.reduce_metrics([output])
        return found | {name: float(value) for name, value in meters.get_smoothed_values().items()}


def _number(value: Any, name: str) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, (int, float)):
        raise ValueError(f"the logging output {name!r} is a {type(value).__name__}; only numbers can be summed")
    return value


def entry(kind: type[Any], dataclass: type | None) -> Entry:
    """A loss in fairseq's form as an entry of our table.

    Raises: ValueError for a class that is none.
    """
    if not (isinstance(kind, type) and issubclass(kind, FairseqCriterion)):
        raise ValueError(
            f"register_criterion: {getattr(kind, '__name__', kind)} is no FairseqCriterion; derive it from that, or "
            "give a config as second argument (docs/extending.md)"
        )
    return Entry(config_of(kind, dataclass, CriterionConfig), functools.partial(FairseqFormLoss, kind))


def label_smoothed_nll_loss(
    lprobs: Tensor, target: Tensor, epsilon: float, ignore_index: int | None = None, reduce: bool = True
) -> tuple[Tensor, Tensor]:
    """Smoothed and plain loss, summed, of log-probabilities (..., V) and targets (...,) or (..., 1).

    Raises: ValueError without ``reduce``.
    """
    if not reduce:
        raise ValueError("label_smoothed_nll_loss gives sums only; leave out reduce=False")
    target_N, logp_NV = target.reshape(-1), lprobs.reshape(-1, lprobs.shape[-1])
    if ignore_index is not None:
        kept = torch.nonzero(target_N != ignore_index).squeeze(1)
        target_N, logp_NV = target_N[kept], logp_NV[kept]
    return smoothed_nll(logp_NV, target_N, epsilon)
