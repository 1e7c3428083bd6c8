"""Options of optimizers and learning rate schedules. No torch here: the flags are made from these."""

from __future__ import annotations

import ast
import logging
import math
from dataclasses import dataclass

from fairseq.config import UnreadableError, flag, float_list, int_list, require_at_least

logger = logging.getLogger(__name__)

NEVER_STOPS = "training would never stop; give --max-update, --max-epoch, --stop-min-lr or --stop-time-hours"


def _pair(name: str, value: tuple[float, ...]) -> None:
    if len(value) != 2:
        raise ValueError(f"{name} needs two numbers such as '(0.9, 0.98)', got {value}")


def rate_table(text: str) -> dict[int, float]:
    """Parse ``{'1': 0.1, '2-4': 0.05, '5,6': 0.01}``; a range stands for each of its numbers.

    Raises: UnreadableError for anything else.
    """
    found: dict[int, float] = {}
    try:
        for key, rate in dict(ast.literal_eval(text)).items():
            for part in str(key).split(","):
                first, dash, last = part.partition("-")
                numbers = range(int(first), int(last if dash else first) + 1)
                found |= dict.fromkeys(numbers, float(rate))
    except (ValueError, SyntaxError, TypeError):
        example = "\"{'1': 0.1, '2-4': 0.05}\""
        raise UnreadableError(f"{text!r} gives no rate for each number or range; write {example}") from None
    return found


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with decoupled weight decay (arXiv 1412.6980, 1711.05101)."""

    adam_betas: tuple[float, ...] = flag("--adam-betas", default=(0.9, 0.999), parse=float_list)
    """Decay of the running means of the gradient and of its square."""
    adam_eps: float = flag("--adam-eps", default=1e-8)
    """Added to the denominator."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight taken off at an update, times the learning rate."""

    def __post_init__(self) -> None:
        _pair("--adam-betas", self.adam_betas)
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam-betas must lie in [0, 1), got {self.adam_betas}")
        require_at_least(0, adam_eps=self.adam_eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamaxConfig:
    """Adam with the largest gradient so far instead of the mean square (arXiv 1412.6980, sec. 7.1)."""

    adamax_betas: tuple[float, ...] = flag("--adamax-betas", default=(0.9, 0.999), parse=float_list)
    """Decay of the running mean of the gradient and of its largest size."""
    adamax_eps: float = flag("--adamax-eps", default=1e-8)
    """Least size of a gradient in the denominator."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight taken off at an update, times the learning rate."""

    def __post_init__(self) -> None:
        _pair("--adamax-betas", self.adamax_betas)
        if not all(0 <= beta < 1 for beta in self.adamax_betas):
            raise ValueError(f"--adamax-betas must lie in [0, 1), got {self.adamax_betas}")
        require_at_least(0, adamax_eps=self.adamax_eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdagradConfig:
    """Steps in proportion to 1 / sqrt(sum of squared gradients) (Duchi et al., JMLR 12, 2011)."""

    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight added to its gradient."""

    def __post_init__(self) -> None:
        require_at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdadeltaConfig:
    """Steps relative to the size of earlier steps (arXiv 1212.5701)."""

    adadelta_rho: float = flag("--adadelta-rho", default=0.9)
    """Decay of the running means of squared gradients and squared steps."""
    adadelta_eps: float = flag("--adadelta-eps", default=1e-6)
    """Added under both roots."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight added to its gradient."""

    def __post_init__(self) -> None:
        if not 0 <= self.adadelta_rho <= 1:
            raise ValueError(f"--adadelta-rho must lie in [0, 1], got {self.adadelta_rho}")
        require_at_least(0, adadelta_eps=self.adadelta_eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class NagConfig:
    """Nesterov's accelerated gradient as simplified in arXiv 1212.0901, sec. 3.5, with decoupled weight decay."""

    momentum: float = flag("--momentum", default=0.99)
    """Momentum: share of the velocity kept at each update."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight taken off at an update, times the learning rate."""

    def __post_init__(self) -> None:
        require_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """Stochastic gradient descent; weight decay is added to the gradient."""

    momentum: float = flag("--momentum", default=0.0)
    """Momentum: share of the velocity kept at each update."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight added to its gradient."""

    def __post_init__(self) -> None:
        require_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """Adafactor (arXiv 1804.04235): the second moments of a matrix as one row and one column."""

    adafactor_eps: tuple[float, ...] = flag("--adafactor-eps", default=(1e-30, 1e-3), parse=float_list)
    """Least squared gradient, and least size of a parameter for --scale-parameter."""
    clip_threshold: float = flag("--clip-threshold", default=1.0)
    """Scale an update down to this root mean square."""
    decay_rate: float = flag("--decay-rate", default=-0.8)
    """The second moments keep 1 - update ** decay_rate of their past."""
    beta1: float | None = flag("--beta1", default=None)
    """Keep a running mean of the updates with this weight; by default none is kept."""
    scale_parameter: bool = flag("--scale-parameter", default=False)
    """Make steps relative to the root mean square of each parameter."""
    relative_step: bool = flag("--relative-step", default=False)
    """Let the number of updates decide the step size, min(0.01, 1 / sqrt(update)); --lr is not used then."""
    warmup_init: bool = flag("--warmup-init", default=False)
    """With --relative-step, begin with steps of 1e-6 * update."""
    weight_decay: float = flag("--weight-decay", "--wd", default=0.0)
    """Fraction of each weight taken off at an update, times the step size."""

    def __post_init__(self) -> None:
        _pair("--adafactor-eps", self.adafactor_eps)
        if self.clip_threshold <= 0:
            raise ValueError(f"--clip-threshold must be above 0, got {self.clip_threshold}")
        if self.decay_rate > 0:
            raise ValueError(f"--decay-rate is an exponent, at most 0, got {self.decay_rate}")
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise ValueError(f"--beta1 must lie in [0, 1), got {self.beta1}")
        if self.warmup_init and not self.relative_step:
            raise ValueError("--warmup-init needs --relative-step; with --lr, warm up by the schedule instead")
        require_at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class FixedConfig:
    """One learning rate per epoch, then shrinking."""

    force_anneal: int | None = flag("--force-anneal", "--fa", default=None)
    """First epoch (counted from 1) that shrinks the rate; by default none does."""
    lr_shrink: float = flag("--lr-shrink", default=0.1)
    """Factor by which the rate shrinks."""
    warmup_updates: int = flag("--warmup-updates", default=0)
    """Raise the rate linearly over this many updates."""

    def __post_init__(self) -> None:
        require_at_least(0, lr_shrink=self.lr_shrink, warmup_updates=self.warmup_updates)


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    """Cosine annealing with warm-up and warm restarts (arXiv 1608.03983)."""

    warmup_updates: int = flag("--warmup-updates", default=0)
    """Raise the rate linearly over this many updates."""
    warmup_init_lr: float = flag("--warmup-init-lr", default=-1.0)
    """Rate at the start of the warm-up; -1 for the lowest rate of the schedule."""
    max_lr: float | None = flag("--max-lr", default=None)
    """Highest rate, --lr then being the lowest; by default --lr is the highest and --min-lr the lowest."""
    t_mult: float = flag("--t-mult", default=1.0)
    """Each period is this many times as long as the one before."""
    lr_period_updates: float = flag("--lr-period-updates", default=-1.0)
    """Updates of the first period; -1 for all updates after the warm-up."""
    lr_shrink: float = flag("--lr-shrink", default=0.1)
    """Factor on the highest and the lowest rate at each new period."""

    def __post_init__(self) -> None:
        require_at_least(1, hint="periods do not get shorter", t_mult=self.t_mult)
        require_at_least(0, max_lr=self.max_lr, lr_shrink=self.lr_shrink, warmup_updates=self.warmup_updates)


@dataclass(frozen=True, kw_only=True)
class InverseSqrtConfig:
    """Linear warm-up, then in proportion to 1 / sqrt(update)."""

    warmup_updates: int = flag("--warmup-updates", default=4000)
    """Raise the rate linearly over this many updates."""
    warmup_init_lr: float = flag("--warmup-init-lr", default=-1.0)
    """Rate at the start of the warm-up; -1 for 0, or for --lr when there is no warm-up."""

    def __post_init__(self) -> None:
        require_at_least(0, warmup_updates=self.warmup_updates)


@dataclass(frozen=True, kw_only=True)
class PolynomialDecayConfig:
    """Linear warm-up, then a polynomial descent to the end rate."""

    force_anneal: int | None = flag("--force-anneal", "--fa", default=None)
    """First epoch (counted from 1) that no longer takes its rate from the list of --lr."""
    warmup_updates: int = flag("--warmup-updates", default=0)
    """Raise the rate linearly over this many updates."""
    end_learning_rate: float = flag("--end-learning-rate", default=0.0)
    """Rate from --total-num-update on."""
    power: float = flag("--power", default=1.0)
    """Exponent of the descent; 1 is a straight line."""
    total_num_update: int = flag("--total-num-update", "--max-num-update", default=1_000_000)
    """Update at which the descent ends."""

    def __post_init__(self) -> None:
        require_at_least(
            0, warmup_updates=self.warmup_updates, end_learning_rate=self.end_learning_rate, power=self.power
        )
        if self.total_num_update <= self.warmup_updates:
            raise ValueError(
                f"--total-num-update {self.total_num_update} must be larger than --warmup-updates {self.warmup_updates}"
            )


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """Shrink the rate when the validation figure no longer gets better."""

    lr_shrink: float = flag("--lr-shrink", default=0.1)
    """Factor by which the rate shrinks."""
    lr_threshold: float = flag("--lr-threshold", default=1e-4)
    """Relative change that counts as better."""
    lr_patience: int = flag("--lr-patience", default=0)
    """Epochs without a better figure that are let pass."""
    warmup_updates: int = flag("--warmup-updates", default=0)
    """Raise the rate linearly over this many updates."""
    warmup_init_lr: float = flag("--warmup-init-lr", default=-1.0)
    """Rate at the start of the warm-up; -1 for 0, or for --lr when there is no warm-up."""
    maximize_best_checkpoint_metric: bool = flag("--maximize-best-checkpoint-metric", default=False)
    """The larger the figure the better."""

    def __post_init__(self) -> None:
        if not 0 < self.lr_shrink < 1:
            raise ValueError(f"--lr-shrink must lie between 0 and 1, got {self.lr_shrink}")
        require_at_least(
            0, lr_threshold=self.lr_threshold, lr_patience=self.lr_patience, warmup_updates=self.warmup_updates
        )


@dataclass(frozen=True, kw_only=True)
class TriStageConfig:
    """Warm-up, constant rate, exponential descent (arXiv 1904.08779, sec. 4.2)."""

    warmup_steps: int = flag("--warmup-steps", default=0)
    """Updates over which the rate rises linearly."""
    hold_steps: int = flag("--hold-steps", default=0)
    """Updates at --lr after that."""
    decay_steps: int = flag("--decay-steps", default=0)
    """Updates over which the rate falls after that."""
    phase_ratio: tuple[float, ...] | None = flag("--phase-ratio", default=None, parse=float_list)
    """The three phases as shares of --max-update, such as '(0.1, 0.4, 0.5)', instead of their updates."""
    init_lr_scale: float = flag("--init-lr-scale", default=0.01)
    """Rate at the start, as a share of --lr."""
    final_lr_scale: float = flag("--final-lr-scale", default=0.01)
    """Rate at the end, as a share of --lr."""

    def __post_init__(self) -> None:
        require_at_least(
            0,
            warmup_steps=self.warmup_steps,
            hold_steps=self.hold_steps,
            decay_steps=self.decay_steps,
            init_lr_scale=self.init_lr_scale,
        )
        if not self.final_lr_scale > 0:
            raise ValueError(f"--final-lr-scale must be above 0, got {self.final_lr_scale}: the descent is exponential")
        ratio = self.phase_ratio
        if ratio is not None and (len(ratio) != 3 or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6):
            raise ValueError(
                f"--phase-ratio needs three shares that add up to 1, such as '(0.1, 0.4, 0.5)', got {ratio}"
            )


@dataclass(frozen=True, kw_only=True)
class TriangularConfig:
    """Linear rises and falls between two rates (arXiv 1506.01186)."""

    max_lr: float | None = flag("--max-lr", default=None)
    """Highest rate; --lr is the lowest."""
    lr_period_updates: float = flag("--lr-period-updates", default=5000.0)
    """Updates of a rise and a fall."""
    lr_shrink: float = flag("--lr-shrink", default=0.1)
    """Factor on the highest rate at each new period."""
    shrink_min: bool = flag("--shrink-min", default=False)
    """Shrink the lowest rate as well."""

    def __post_init__(self) -> None:
        require_at_least(2, hint="a rise and a fall take one each", lr_period_updates=self.lr_period_updates)
        require_at_least(0, lr_shrink=self.lr_shrink)


@dataclass(frozen=True, kw_only=True)
class ManualConfig:
    """Rates given by hand for epochs or updates."""

    epoch2lr: dict[int, float] | None = flag("--epoch2lr", default=None, parse=rate_table)
    """Rate from an epoch (counted from 1) on, such as "{'1': 0.1, '2-4': 0.05, '5,6': 0.01}"."""
    update2lr: dict[int, float] | None = flag("--update2lr", default=None, parse=rate_table)
    """Rate from an update on, in the same form; it goes before --epoch2lr."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Options of the moving average of the weights."""

    store_ema: bool = flag("--store-ema", default=False)
    """Keep an exponential moving average of the weights in each checkpoint; average_checkpoints.py --ema reads it."""
    ema_decay: float = flag("--ema-decay", default=0.9999)
    """Share of the average that is kept at each update."""
    ema_start_update: int = flag("--ema-start-update", default=0)
    """Update at which averaging begins; the weights are copied before."""
    ema_update_freq: int = flag("--ema-update-freq", default=1)
    """Average after every so many updates."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"--ema-decay must lie in [0, 1], got {self.ema_decay}")
        require_at_least(0, ema_start_update=self.ema_start_update)
        require_at_least(1, ema_update_freq=self.ema_update_freq)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Options of optimisation: limits, learning rates, clipping and accumulation."""

    max_epoch: int = flag("--max-epoch", "--me", default=0)
    """Stop after this epoch; 0 for no limit."""
    max_update: int = flag("--max-update", "--mu", default=0)
    """Stop after this update; 0 for no limit."""
    stop_time_hours: float = flag("--stop-time-hours", default=0.0)
    """Stop (with a checkpoint) after this many hours; 0 for no limit."""
    clip_norm: float = flag("--clip-norm", default=25.0)
    """Scale gradients down to this norm; 0 leaves them alone."""
    update_freq: tuple[int, ...] = flag("--update-freq", default=(1,), parse=int_list)
    """Batches per update and process; a list gives one number per epoch, the last one applies from then on."""
    skip_remainder_batch: bool = flag("--skip-remainder-batch", default=False)
    """Drop the batches at the end of an epoch that are fewer than --update-freq."""
    lr: tuple[float, ...] = flag("--lr", "--learning-rate", default=(0.25,), parse=float_list)
    """Learning rate; a list gives one per epoch, see the schedule."""
    stop_min_lr: float = flag("--stop-min-lr", default=-1.0)
    """Stop training once the learning rate is this small; -1 for never."""
    min_lr: float | None = flag("--min-lr", default=None)
    """Lowest rate of the cosine schedule (without --max-lr), as in fairseq 0.12; with any other schedule, as in
    fairseq 0.9, the same as --stop-min-lr."""

    def __post_init__(self) -> None:
        if min(self.update_freq) < 1:
            raise ValueError(f"--update-freq must be at least 1, got {','.join(map(str, self.update_freq))}")
        if self.max_epoch <= 0 and self.max_update <= 0 and self.stop_time_hours <= 0 and self._no_lowest:
            raise ValueError(NEVER_STOPS)
        if not all(0 <= rate < math.inf for rate in self.lr):
            raise ValueError(f"--lr must be finite and at least 0, got {','.join(map(str, self.lr))}")

    @property
    def _no_lowest(self) -> bool:
        return self.stop_min_lr < 0 and (self.min_lr is None or self.min_lr < 0)

    def stop_lr(self, *, has_floor: bool) -> float:
        """The rate at which training stops; -1 for none. fairseq 0.9 and 0.12 mean different things by ``--min-lr``.

        Args:
            has_floor: the schedule takes ``--min-lr`` as its lowest rate, so that it does not stop training.
        Raises: ValueError when nothing else would stop it.
        """
        if not has_floor and self.min_lr is not None:
            if self.stop_min_lr < 0:
                logger.info("--min-lr %g stops training at that rate, as in fairseq 0.9", self.min_lr)
                return self.min_lr
            logger.warning("--min-lr %g is ignored: this schedule has no lowest rate of its own", self.min_lr)
        if self.stop_min_lr < 0 and self.max_epoch <= 0 and self.max_update <= 0 and self.stop_time_hours <= 0:
            raise ValueError(NEVER_STOPS)
        return self.stop_min_lr

    def update_freq_in(self, epoch: int) -> int:
        """Batches per update in an epoch (counted from 1)."""
        return self.update_freq[min(epoch, len(self.update_freq)) - 1]
