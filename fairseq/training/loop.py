"""A training run from its settings to its last checkpoint: epochs, validation, saving, resuming."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, load_model_for, save_checkpoint
from fairseq.checkpoints.parts import index_entry, split, write_part
from fairseq.config import to_dict
from fairseq.criterions.base import build_criterion
from fairseq.data.trime_batching import ranks_together, training_order
from fairseq.generation.validation import ValidationBleu
from fairseq.metrics.bleu import bleu_of_counts
from fairseq.metrics.training import StepSums, TrainMeters, valid_figures
from fairseq.models.architectures import (
    MODELS,
    build_model_config,
    model_class,
    model_config_class,
    model_name,
)
from fairseq.models.config import (
    architecture_of,
    model_config_from,
    require_same_architecture,
)
from fairseq.optim.ema import WeightAverage
from fairseq.optim.lr_schedulers import build_lr_scheduler
from fairseq.optim.optimizers import build_optimizer
from fairseq.runtime.distributed import make_fabric, sum_over_ranks, where_tensors_lie
from fairseq.runtime.manifest import write_manifest
from fairseq.tasks import TASKS
from fairseq.trainer import Trainer
from fairseq.training.checkpoint_manager import CheckpointManager
from fairseq.training.config import require_same_parts, require_strategy_fits
from fairseq.training.progress import Progress, copy_log_to_file

if TYPE_CHECKING:
    from fairseq.data.iterators import EpochBatchIterator
    from fairseq.data.types import LMBatch
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.optim.lr_schedulers import LRSchedule
    from fairseq.tasks.language_modeling import LanguageModelingTask
    from fairseq.training.config import TrainingConfigs

logger = logging.getLogger(__name__)


class TrainingLoop:
    """One run. Building it checks everything that can be wrong; :meth:`run` trains."""

    def __init__(self, configs: TrainingConfigs) -> None:
        """Raises: ValueError or OSError for whatever does not fit, before the first update."""
        self.configs = configs
        self.data, self.batching, self.validation = configs.data, configs.batching, configs.validation
        self.optimization, self.runtime, self.checkpoints = configs.optimization, configs.runtime, configs.checkpoints
        if self.runtime.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.task: LanguageModelingTask = TASKS[configs.chosen["task"]].load()(configs.task)
        torch.manual_seed(self.runtime.seed)
        self.bleu = ValidationBleu.of(self.task)
        self.checkpoint_manager = CheckpointManager(self.checkpoints)
        self.restore_path = self.checkpoint_manager.restore_path()
        self.restored = load_checkpoint(self.restore_path, whole=True) if self.restore_path else None
        self.started_from: Mapping[str, Any] = {} if self.restored is None else self.restored.config
        self.model = self._model()
        self.task.attach([self.model], trains=True)
        if self.restored is not None:
            self.started_from = self.restored.config
        start = self.restore_path or self.checkpoints.finetune_from_model
        self.task.check_start(start, self.started_from, resumes=self.restored is not None)
        self.checkpoint_manager.prepare()
        criterion = build_criterion(configs.chosen["criterion"], configs.options, self.model, self.task)
        require_strategy_fits(configs, self.model.config)
        find_unused = self.model.may_skip_parameters or configs.distributed.find_unused_parameters
        self.fabric = make_fabric(self.runtime, configs.distributed, find_unused, self.optimization.clip_norm)
        self.layout = where_tensors_lie(self.fabric, configs.distributed)
        self.trainer = Trainer(
            self.layout,
            self.model,
            criterion,
            self._optimizer,
            self._schedule(),
            self.optimization,
            self.runtime.seed,
        )
        self.average = WeightAverage(configs.ema, self.model) if configs.ema.store_ema else None
        self.stop_lr = self.optimization.stop_lr(has_floor=self.trainer.schedule.has_floor)
        self.meters = TrainMeters(losses=criterion.figures)
        self.progress = Progress(configs.common, enabled=self.fabric.is_global_zero)
        copy_log_to_file(configs.common)
        self.valid_sets = self._valid_iterators()
        self.iterator = self._train_iterator(epoch=1)
        self.seconds = 0.0
        self.started = time.perf_counter()
        self.last_figures: dict[str, float] = {}

    @property
    def model_name(self) -> str:
        """Name of the model's class; a finetuned model keeps its own."""
        found = (name for name in MODELS if type(self.model) is model_class(name))
        return next(found, "transformer_lm")  # a class that a plug-in's task made by itself

    def _model(self) -> TransformerLanguageModel:
        chosen, given = self.configs.chosen, self.configs.options
        path = self.checkpoints.finetune_from_model
        if path:
            kind = model_name(chosen["arch"])
            own = {field.name for field in fields(model_config_class(kind))}
            asked = {name: value for name, value in (self.task.model_limits() | dict(given)).items() if name in own}
            found = load_checkpoint(path)
            self.started_from = found.config
            return load_model_for(self.task.dictionary, found, path, asked, self.task.source, kind)
        model: TransformerLanguageModel = self.task.build_model(
            chosen["arch"], self._foreign_architecture() | dict(given)
        )
        return model

    def _foreign_architecture(self) -> dict[str, Any]:
        """Architecture of a checkpoint of fairseq that the run starts with, as far as no other one is asked for.

        ``--arch transformer_lm`` stands for other settings in fairseq 0.12 (post-norm) than in 0.9.
        """
        found, options = self.restored, self.configs.options
        saved_arch = found.config["chosen"].get("arch") if found is not None else None
        if found is None or not found.written_by or ("arch" in options and saved_arch != options["arch"]):
            return {}
        arch = self.configs.chosen["arch"]
        saved = architecture_of(model_config_from(found.config["model"], model_config_class(model_name(arch))))
        asked = architecture_of(build_model_config(arch, options))
        taken = {name: value for name, value in saved.items() if name not in options and value != asked[name]}
        if taken:
            listed = ", ".join(f"{name} {value}" for name, value in taken.items())
            logger.info("taken from %s (%s): %s", self.restore_path, found.written_by, listed)
        return taken

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return build_optimizer(
            self.configs.chosen["optimizer"], parameters, self.configs.options, self.optimization.lr[0]
        )

    def _schedule(self) -> LRSchedule:
        limits = self.optimization
        lowest = -1.0 if limits.min_lr is None else limits.min_lr
        return build_lr_scheduler(
            self.configs.chosen["lr_scheduler"], self.configs.options, limits.lr, limits.max_update, lowest
        )

    def _train_iterator(self, epoch: int) -> EpochBatchIterator:
        dataset = self.task.blocks(self.validation.train_subset, epoch=epoch, combine=True)
        batches = self.task.training_batches(
            dataset,
            max_tokens=self.data.max_tokens,
            max_sentences=self.data.max_sentences,
            multiple=self.data.required_batch_size_multiple,
            seed=self.runtime.seed,
            max_positions=self.model.max_positions,
            order=training_order(self.batching, len(dataset), dataset.unit),
        )
        return self.task.iterator(
            dataset,
            batches,
            seed=self.runtime.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            num_workers=self.data.num_workers,
            shuffle=True,
            ordered_epochs=self.validation.curriculum,
            group=ranks_together(self.batching, self.data.max_tokens, self.fabric.world_size),
        )

    def _valid_iterators(self) -> dict[str, EpochBatchIterator]:
        if self.validation.disable_validation:
            return {}
        self._warn_of_unused_subsets()
        found = {}
        data = replace(
            self.data,
            max_tokens=self.validation.max_tokens_valid or self.data.max_tokens,
            max_sentences=self.validation.max_sentences_valid or self.data.max_sentences,
        )
        for subset in self.validation.valid_subset.split(","):
            dataset = self.task.blocks(subset, combine=self.validation.combine_valid_subsets)
            batches = self.task.batches(dataset, data, seed=self.runtime.seed, max_positions=self.model.max_positions)
            found[subset] = self.task.iterator(
                dataset, batches, rank=self.fabric.global_rank, world_size=self.fabric.world_size
            )
        return found

    def _warn_of_unused_subsets(self) -> None:
        """Name the numbered splits beside those of --valid-subset that no validation reads."""
        config = self.validation
        named = config.valid_subset.split(",")
        unused = {more for subset in named for more in self.task.numbered_after(subset)} - set(named)
        if unused and not (config.combine_valid_subsets or config.ignore_unused_valid_subsets):
            logger.warning(
                "validation does not read %s; add them to --valid-subset, or give --combine-valid-subsets, or "
                "--ignore-unused-valid-subsets to say so",
                ", ".join(sorted(unused)),
            )

    def run(self) -> None:
        """Train until a limit is reached, beginning where the last checkpoint of this run stands."""
        self._restore()
        self._check_metric()
        while not self._finished():
            self._train_epoch()
        self.progress.close()
        if self.fabric.is_global_zero:
            self._write_manifest()
        logger.info("done training in %.1f seconds", self._seconds())

    def _check_metric(self) -> None:
        """Find out from one batch whether validation gives --best-checkpoint-metric, where its name does not."""
        if self.valid_sets and self.checkpoints.best_checkpoint_metric not in ("loss", "ppl"):
            batches = next(iter(self.valid_sets.values()))
            sums = self.trainer.valid_pass(itertools.islice(iter(batches), 1))
            batches.next_epoch()
            self._metric_in(self._figures(sums, 0.0) | ({} if self.bleu is None else {"bleu": 0.0}))

    def _figures(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Figures of a validation pass that took so many seconds."""
        return valid_figures(sums, seconds, self.trainer.num_updates, self.trainer.criterion.figures)

    def _metric_in(self, figures: Mapping[str, float]) -> float:
        """The figure that decides. Raises: ValueError when --best-checkpoint-metric is no figure of the validation."""
        metric = self.checkpoints.best_checkpoint_metric
        if metric not in figures:
            raise ValueError(f"--best-checkpoint-metric {metric}: validation gives {', '.join(figures)}; name one")
        return float(figures[metric])

    def _train_epoch(self) -> None:
        epoch = self.iterator.epoch
        if len(self.task.folders) > 1:
            self._turn_to_folder_of(epoch)
        self.trainer.start_epoch(epoch)
        update_freq = self.optimization.update_freq_in(epoch)
        skips = self.optimization.skip_remainder_batch
        total, done = (_ceil_div(n, update_freq) for n in (len(self.iterator), self.iterator.batches_done))
        if skips:
            total = len(self.iterator) // update_freq
            if not total:
                raise ValueError(
                    f"--skip-remainder-batch drops the whole epoch: it has {len(self.iterator)} batches per process, "
                    f"--update-freq takes {update_freq}; lower --update-freq"
                )
        if done == 0:
            self.meters.begin_epoch()
        with self.progress.epoch(epoch, total, done) as shown:
            for batches in _groups_of(update_freq, iter(self.iterator), whole=skips):
                began = time.perf_counter()
                self.meters.add(self.trainer.train_step(batches), time.perf_counter() - began)
                if self.average is not None:
                    self.average.update(self.model, self.trainer.num_updates)
                shown.step(lambda: self.meters.inner_figures(self.trainer.num_updates, self.trainer.lr))
                if not self.iterator.end_of_epoch and self._wants_stop_inside():
                    self._validate_and_save(epoch, end_of_epoch=False)
                    if self._finished():
                        return
        self.progress.end_of_epoch(epoch, self.meters.epoch_figures(self.trainer.num_updates, self.trainer.lr))
        self._validate_and_save(epoch, end_of_epoch=True)

    def _turn_to_folder_of(self, epoch: int) -> None:
        state = self.iterator.state_dict()
        self.iterator = self._train_iterator(epoch)
        self.iterator.load_state_dict(state)

    def _wants_stop_inside(self) -> bool:
        """True if it is time to validate or save before the epoch ends."""
        update = self.trainer.num_updates
        intervals = (self.checkpoints.save_interval_updates, self.validation.validate_interval_updates)
        return any(n > 0 and update % n == 0 for n in intervals) or self._limit_reached()

    def _validate_and_save(self, epoch: int, *, end_of_epoch: bool) -> None:
        update = self.trainer.num_updates
        ends = self._limit_reached() or (end_of_epoch and epoch == self.optimization.max_epoch)
        every = self.validation.validate_interval_updates
        validates = (epoch % self.validation.validate_interval == 0 if end_of_epoch else True) or ends
        validates |= every > 0 and update % every == 0
        due = self.checkpoints.saves_after(update)
        validates |= due
        figure = self._validate(epoch) if validates and self.valid_sets else None
        if end_of_epoch:
            self.trainer.end_epoch(epoch, figure)
            self.iterator.next_epoch()
        better = self.checkpoint_manager.note(figure)
        names = self.checkpoint_manager.names(
            epoch=epoch, update=update, end_of_epoch=end_of_epoch, better=better, figure=figure
        )
        wanted = not end_of_epoch or ends or epoch % self.checkpoints.save_interval == 0 or better or due
        if wanted:
            self._save(names)

    def _save(self, names: list[str]) -> None:
        """Save the state under these names. Raises: OSError in every process when one cannot, so that none waits."""
        if not names:
            return
        state, parts, failure = self._checkpoint(), None, None
        try:
            if self.configs.distributed.use_sharded_state:
                state, parts = self._part_of(state)
            else:
                state = Checkpoint(**self.layout.collected(vars(state)))
        except OSError as error:
            failure = error
        self._raise_together(failure)
        if self.fabric.is_global_zero:
            try:
                self.checkpoint_manager.write(names, lambda path: save_checkpoint(path, state, parts))
            except OSError as error:
                failure = error
        self._raise_together(failure)

    def _part_of(self, state: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """Write this process's part of a state; returns what is left of it, and what the checkpoint says of parts."""
        rest, places, held = split(vars(state), self.layout.held)
        name = self.fabric.broadcast(f"update{self.trainer.num_updates}-{secrets.token_hex(4)}")
        write_part(self.checkpoints.save_dir, name, self.fabric.global_rank, held)
        where, shapes = ([entry[i] for entry in places] for i in (0, 1))
        return Checkpoint(**rest), index_entry(name, self.fabric.world_size, where, shapes)

    def _raise_together(self, failure: OSError | None) -> None:
        failed = sum_over_ranks(self.fabric, [float(failure is not None)])[0]
        if failed:
            raise failure or OSError("another process could not save its checkpoint; see its message")

    def _validate(self, epoch: int) -> float | None:
        """Validate on every subset; returns the figure of the first one that decides which checkpoint is best."""
        figure = None
        for subset, batches in self.valid_sets.items():
            began = time.perf_counter()
            sums = self.trainer.valid_pass(itertools.islice(iter(batches), self.validation.max_valid_steps))
            batches.next_epoch()
            figures = self._figures(sums, time.perf_counter() - began) | self._generated_figures(batches)
            if figure is None:
                figure = self._metric_in(figures)
                self.last_figures = dict(figures)
                best = figure if self.checkpoint_manager.is_better(figure) else self.checkpoint_manager.best
                if best is not None and self.checkpoint_manager.best is not None:
                    figures[f"best_{self.checkpoints.best_checkpoint_metric}"] = best
            self.progress.validated(subset, epoch, figures)
        return figure

    def _generated_figures(self, batches: EpochBatchIterator) -> dict[str, float]:
        """BLEU of translations of a validation split, with --eval-bleu."""
        if self.bleu is None:
            return {}
        read = itertools.islice(iter(batches), self.validation.max_valid_steps)
        with self.layout.direct_use():
            counts = self.bleu.counts(self.model, read)
        batches.next_epoch()
        names = sorted(counts)
        sums = sum_over_ranks(self.fabric, [counts[name] for name in names])
        return {"bleu": bleu_of_counts(dict(zip(names, sums)))}

    def _checkpoint(self) -> Checkpoint:
        state = self.trainer.state_dict(with_optimizer=not self.checkpoints.no_save_optimizer_state)
        configs = self.configs
        return Checkpoint(
            config={
                "task": to_dict(self.task.config) | {"name": configs.chosen["task"], **self._facts()},
                "model": to_dict(self.model.config) | {"arch": configs.chosen["arch"], "kind": self.model_name},
                "chosen": dict(configs.chosen),
                "given": {name: _plain(value) for name, value in configs.options.items()},
            },
            model=self.layout.weights(self.model),
            optimizer=state["optimizer"],
            scheduler=state["scheduler"],
            iterator=self.iterator.state_dict(),
            progress={
                "num_updates": state["num_updates"],
                "keeper": self.checkpoint_manager.state_dict(),
                "meters": self.meters.state_dict(),
                "seconds": self._seconds(),
                "figures": self.last_figures,
            }
            | ({} if self.average is None else {"ema": self.average.weights}),
        )

    def _facts(self) -> dict[str, Any]:
        """Digests of the dictionaries, by the names under which a checkpoint keeps them, and what the task adds."""
        source = {} if self.task.source is None else {"source_dictionary_digest": self.task.source.digest()}
        return {"dictionary_digest": self.task.dictionary.digest(), **source, **self.task.facts_of_model()}

    def _restore(self) -> None:
        """Take up the run in --save-dir, if there is one. Raises: ValueError when it is another model's."""
        path, found = self.restore_path, self.restored
        if path is None or found is None:
            return
        self.restored = None  # its weights are needed only once
        loaded = load_model_for(self.task.dictionary, found, path, source=self.task.source)
        require_same_architecture(path, loaded.config, self.model.config)
        try:
            self.layout.load_weights(self.model, loaded.state_dict())
        except RuntimeError as error:  # settings that seldom matter, such as the number of learned positions
            first = str(error).splitlines()[1].strip()
            raise ValueError(
                f"{path} holds other weights than the flags ask for ({first[:200]}); give the flags it was trained "
                "with, or another --save-dir"
            ) from error
        options = self.checkpoints
        progress = found.progress or {}
        if found.progress is None or found.scheduler is None:
            logger.warning("%s holds weights only: the run starts at update 0 with them", path)
            return
        require_same_parts(path, found.config.get("chosen", {}), self.configs.chosen, options)
        state = {"optimizer": found.optimizer, "scheduler": found.scheduler, "num_updates": progress["num_updates"]}
        try:
            self.trainer.load_state_dict(
                state, reset_optimizer=options.reset_optimizer, reset_schedule=options.reset_lr_scheduler
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if self.average is not None:
            stored = progress.get("ema") or self.model.state_dict()
            own = self.average.weights
            self.average.load({name: self.layout.spread(value, own.get(name)) for name, value in stored.items()})
        if not options.reset_dataloader and found.iterator is not None:
            self.iterator.load_state_dict(found.iterator)
        if not options.reset_meters:
            self.checkpoint_manager.load_state_dict(progress["keeper"])
            self.meters.load_state_dict(progress["meters"])
            self.seconds = progress["seconds"]
            self.last_figures = progress.get("figures", {})
        logger.info("resumed from %s (epoch %d, %d updates)", path, self.iterator.epoch, self.trainer.num_updates)

    def _finished(self) -> bool:
        return self._limit_reached() or self.checkpoint_manager.out_of_patience

    def _limit_reached(self) -> bool:
        limits = self.optimization
        if 0 < limits.max_update <= self.trainer.num_updates:
            return True
        if 0 < limits.max_epoch < self.iterator.epoch:
            return True
        if limits.stop_time_hours > 0 and self.fabric.broadcast(limits.stop_time_hours * 3600 < self._seconds()):
            return True
        return self.trainer.lr <= self.stop_lr and not self.trainer.schedule.is_warming_up

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _write_manifest(self) -> None:
        if self.checkpoints.no_save:
            return
        splits = [self.validation.train_subset, *self.valid_sets]
        prefixes = [prefix for split in splits for prefix in self.task.prefixes(split)]
        files = [prefix + end for prefix in prefixes for end in (".bin", ".idx")]
        files += glob.glob(os.path.join(glob.escape(self.task.folders[0]), "dict*.txt"))
        write_manifest(
            self.checkpoint_manager.path("train.run.json"),
            program=self.configs.command.program,
            argv=self.configs.command.argv,
            config={"chosen": dict(self.configs.chosen), "given": dict(self.configs.options)}
            | {"model": to_dict(self.model.config)},
            figures={
                "num_updates": self.trainer.num_updates,
                "best": self.checkpoint_manager.best,
                "seconds": self._seconds(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "valid": self.last_figures,
            },
            inputs=files,
            seed=self.runtime.seed,
        )


def _groups_of(count: int, batches: Iterator[LMBatch], *, whole: bool = False) -> Iterator[list[LMBatch]]:
    """Consecutive batches, ``count`` at a time; a smaller last group of an epoch is dropped with ``whole``."""
    while group := list(itertools.islice(batches, count)):
        if len(group) == count or not whole:
            yield group


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
