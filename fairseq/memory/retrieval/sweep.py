"""Many settings of a memory from one search: every share, temperature and number of neighbours of a grid.

The formulas are those of an evaluation, applied to what it saved (``retrieval.py``). A pass over the neighbours yields
the memory's log-probability of every target for one number of neighbours and one temperature; shares are elementwise.

Shapes: N scored tokens, Q those of a part, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.combiners.joint import JointNormalization, mixed_where_found
from fairseq.memory.retrieval.file import Retrieval, differences
from fairseq.memory.retrieval.schema import ABOUT, JOINT_ABOUT, MADE_OF
from fairseq.memory.retrieval.sweep_config import SweepConfig
from fairseq.memory.scoring import interpolate, knn_logp
from fairseq.metrics.word_loss import LossSums, loss_sums
from fairseq.runtime.records import require
from fairseq.runtime.threads import run_in_threads

_PART_NUMBERS = 1 << 18  # neighbours held by a thread at a time, which stay in the CPU's cache


@dataclass(frozen=True)
class Setting:
    """Settings of the interpolation."""

    k: int
    weight: float | None
    """Share of the memory's own distribution; None where the joint normalisation stands alone."""
    temperature: float
    """Divides the similarities in that distribution; with ``weight`` None it is the joint one."""
    joint_temperature: float | None = None
    """Divides them in the joint normalisation (TRIME); None without one."""

    def flags(self) -> str:
        """The words that make an evaluation use it."""
        if self.weight is None:
            return f"--knn-lambda-type trime --k {self.k} --softmax-temp {self.temperature:.10g}"
        names = {"--k": self.k, "--lmbda": self.weight, "--softmax-temp": self.temperature}
        if self.joint_temperature is not None:
            names |= {"--softmax-temp": self.joint_temperature, "--interp-temp": self.temperature}
        return " ".join(f"{name} {value:.10g}" for name, value in names.items())


@dataclass(frozen=True)
class Result:
    """A setting and the loss it gives."""

    setting: Setting
    sums: LossSums

    def to_dict(self) -> dict[str, Any]:
        """As plain types, under the names of the flags."""
        setting = self.setting
        row: dict[str, Any] = {"k": setting.k} if setting.weight is None else {"k": setting.k, "lmbda": setting.weight}
        if setting.joint_temperature is None or setting.weight is None:
            row["softmax_temp"] = setting.temperature
        else:
            row |= {"softmax_temp": setting.joint_temperature, "interp_temp": setting.temperature}
        sums = self.sums
        row |= {"loss_base2": sums.loss_base2, "perplexity": sums.perplexity, "num_tokens": sums.num_tokens}
        return row | {"num_counted": sums.num_counted, "num_impossible": sums.num_impossible}


@dataclass(frozen=True)
class Grid:
    """The settings to evaluate: all combinations."""

    ks: tuple[int, ...]
    weights: tuple[float, ...]
    """Shares; none where the joint normalisation stands alone."""
    temperatures: tuple[float, ...]
    joint_temperatures: tuple[float | None, ...] = (None,)

    @classmethod
    def only(cls, setting: Setting) -> Grid:
        """The grid of one setting."""
        if setting.weight is None:
            return cls((setting.k,), (), (), (setting.joint_temperature,))
        return cls((setting.k,), (setting.weight,), (setting.temperature,), (setting.joint_temperature,))

    @classmethod
    def of(cls, config: SweepConfig, retrieval: Retrieval) -> Grid:
        """The grid a config names, the rest filled in from the saved evaluation.

        Raises: ValueError for settings that the saved neighbours do not cover.
        """
        about = retrieval.about
        ks = config.k or (retrieval.k,)
        if max(ks) > retrieval.k:
            raise ValueError(
                f"--k {max(ks)} is more than the {retrieval.k} neighbours per token in {retrieval.path}; give at most "
                f"{retrieval.k}, or save them again with --k {max(ks)}"
            )
        temperatures = config.temperature or (about["temperature"],)
        if not retrieval.is_joint:
            if config.interp_temp:
                raise ValueError(
                    f"--interp-temp is TRIME's; {retrieval.path} was saved by {about['program']}: give --temperature"
                )
            return cls(ks, config.weights, temperatures)
        if "interp_temp" not in about:
            for name, given in (("--lmbda", config.lmbda), ("--interp-temp", config.interp_temp)):
                if given is not None:
                    raise ValueError(
                        f"{name}: {retrieval.path} was saved by {about['program']} --knn-lambda-type trime, which "
                        "normalises vocabulary and neighbours together and mixes nothing on top; give --temperature"
                    )
            return cls(ks, (), (), temperatures)
        fixed = retrieval.fingerprint.get("softmax_temp")
        if fixed is not None and temperatures != (fixed,):
            raise ValueError(
                f"--temperature {', '.join(f'{t:g}' for t in temperatures)}: the sums of the text's own memories in "
                f"{retrieval.path} were taken at --softmax-temp {fixed:g}; drop it, or save again at another one"
            )
        return cls(ks, config.weights, config.interp_temp or (about["interp_temp"],), temperatures)

    @property
    def settings(self) -> list[Setting]:
        """All of them, shares fastest."""
        pairs = [(k, joint) for k in self.ks for joint in self.joint_temperatures]
        if not self.weights:
            return [Setting(k, None, joint, joint) for k, joint in pairs if joint is not None]
        return [
            Setting(k, weight, temperature, joint)
            for k, joint in pairs
            for temperature in self.temperatures
            for weight in self.weights
        ]


@dataclass(frozen=True)
class Opinions:
    """Log-probabilities of every scored token by the model and by the memory; each (N,) float32."""

    base: Mapping[tuple[int, float | None], Tensor]
    """ln p that the memory's own distribution is mixed into, by (k, joint temperature)."""
    memory: Mapping[tuple[int, float], Tensor]
    """ln p that the memory's own distribution gives, by (k, temperature)."""
    found: Mapping[int, Tensor]
    """bool: whether any neighbour was found, by k."""
    is_joint: bool

    def mixed(self, setting: Setting) -> Tensor:
        """ln p of every token, (N,), in the order in which they were saved."""
        base_N = self.base[setting.k, setting.joint_temperature]
        if setting.weight is None:
            return base_N
        memory_N = self.memory[setting.k, setting.temperature]
        if not self.is_joint:
            return interpolate(base_N, memory_N, setting.weight)
        return mixed_where_found(base_N, memory_N, self.found[setting.k], setting.weight)


def opinions(retrieval: Retrieval, grid: Grid) -> Opinions:
    """One pass over the saved neighbours, in parts, several side by side."""
    count, size = len(retrieval), max(1, _PART_NUMBERS // retrieval.k)
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    bases = [(k, t) for k in grid.ks for t in grid.joint_temperatures]
    memories = [(k, t) for k in grid.ks for t in grid.temperatures]
    made = Opinions(
        {key: torch.empty(count) for key in bases},
        {key: torch.empty(count) for key in memories},
        {k: torch.empty(count, dtype=torch.bool) for k in grid.ks},
        retrieval.is_joint,
    )

    def fill(rows: slice) -> None:
        part = retrieval.part(rows)
        for k in grid.ks:
            found = part.nearest(k)
            made.found[k][rows] = found.keep_NM.any(1)
            for temperature in grid.temperatures:
                made.memory[k, temperature][rows] = knn_logp(found, part.target_N, temperature)
            for joint_temperature in grid.joint_temperatures:
                logp_Q = part.lm_logp_N
                if joint_temperature is not None:
                    combine = _joint(retrieval, joint_temperature)
                    logp_Q = combine.joint(part.lm_logp_N, part.lm_norm_N, found, part.target_N, part.text_sums)
                made.base[k, joint_temperature][rows] = logp_Q

    run_in_threads(fill, parts)
    return made


def _joint(retrieval: Retrieval, temperature: float) -> JointNormalization:
    return JointNormalization(
        dim=int(retrieval.fingerprint["dim"]),
        temperature=temperature,
        with_external=retrieval.about.get("mode") != "li",
    )


def sweep(retrievals: Sequence[Retrieval], grid: Grid) -> list[Result]:
    """The loss of every setting over the tokens of all files."""
    settings = grid.settings
    totals = {setting: LossSums() for setting in settings}
    for retrieval in retrievals:
        order = retrieval.order
        block_N, continues_N = (np.asarray(retrieval.arrays[name])[order] for name in ("block", "continues"))
        said = opinions(retrieval, grid)
        for setting in settings:
            logp_N = said.mixed(setting).double().numpy()[order]
            totals[setting] = totals[setting].plus(loss_sums(block_N, continues_N, logp_N))
    return [Result(setting, sums) for setting, sums in totals.items()]


def language_model_alone(retrievals: Sequence[Retrieval]) -> LossSums:
    """The loss without any memory."""
    total = LossSums()
    for retrieval in retrievals:
        order = retrieval.order
        block_N, continues_N, logp_N = (
            np.asarray(retrieval.arrays[name])[order] for name in ("block", "continues", "lm_logp")
        )
        total = total.plus(loss_sums(block_N, continues_N, logp_N.astype(np.float64)))
    return total


def best_of(results: Sequence[Result]) -> Result:
    """The lowest loss; a setting under which more tokens are impossible, and so dropped, is never better."""
    return min(results, key=lambda result: (result.sums.num_impossible, result.sums.loss_base2))


def at(result: Result, retrievals: Sequence[Retrieval]) -> Result:
    """The same setting on other files. Raises: ValueError when they hold fewer neighbours, or fixed another one."""
    setting = result.setting
    for retrieval in retrievals:
        if setting.k > retrieval.k:
            raise ValueError(
                f"the best setting has --k {setting.k}, and {retrieval.path} holds {retrieval.k} neighbours per token; "
                f"save it again with --k {setting.k}, or sweep --k up to {retrieval.k}"
            )
    return sweep(retrievals, Grid.only(setting))[0]


SHARED = (
    *("joint", "model_digest", "model_dtype", "model_overrides", "key_tap", "dictionary_digest", "remove_bpe"),
    *("context_window", "store_digest", "deleted", "index", "metric", "score", "dim"),
    *("use_local", "use_long", "mem_size", "dedup_memory", "fix_tail_pads", "softmax_temp"),
)
"""Facts that two evaluations must share for a setting of one to mean something in the other."""


def open_all(paths: Sequence[str]) -> list[Retrieval]:
    """Open the files of one evaluation, all shards of it, and compare them with their checksums.

    Raises: ValueError when one is missing, damaged, there twice or of another evaluation.
    """
    opened = [Retrieval.open(path) for path in paths]
    for retrieval in opened:
        retrieval.verify()
        require(retrieval.fingerprint, MADE_OF, f"{retrieval.path}: its made_of")
        require(retrieval.about, JOINT_ABOUT if retrieval.is_joint else ABOUT, f"{retrieval.path}: its about")
    require_whole(opened)
    return opened


def require_whole(opened: Sequence[Retrieval]) -> None:
    """Raise ValueError unless opened files are all shards of one evaluation, each there once."""
    shards = set()
    for retrieval in opened:
        require_alike(opened[0], retrieval, (*SHARED, "subset", "text_digest", "k"))
        shard = tuple(retrieval.fingerprint["shard"])
        if shard in shards:
            raise ValueError(f"{retrieval.path} holds the same part of the text as another file that is named")
        shards.add(shard)
    counts = {count for _, count in shards}
    if len(counts) > 1 or len(shards) != next(iter(counts)):
        listed = ", ".join(f"{number} of {count}" for number, count in sorted(shards))
        raise ValueError(
            f"the files hold the shards {listed} (--shard-id of --num-shards); name all shards of one evaluation"
        )


def require_alike(one: Retrieval, other: Retrieval, names: Sequence[str] = SHARED) -> None:
    """Raise ValueError with both values where two evaluations differ."""
    difference = differences(*({name: r.fingerprint.get(name) for name in names} for r in (one, other)))
    if difference:
        raise ValueError(f"{one.path} and {other.path} are of different evaluations: {difference}; save both alike")


def same_text(one: Sequence[Retrieval], other: Sequence[Retrieval]) -> bool:
    """True if two evaluations scored the same split."""
    return bool(one[0].fingerprint["text_digest"] == other[0].fingerprint["text_digest"])
