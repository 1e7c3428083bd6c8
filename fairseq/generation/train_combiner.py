"""fairseq-train-combiner: neighbours of a split, retrieved once, and the network trained on them.

Source: arXiv 2105.13022, sec. 3.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fairseq.generation.setup import setting_of
from fairseq.memory.combiners.facts import FactReader
from fairseq.memory.combiners.learned_files import MadeFor, save_combiner
from fairseq.memory.combiners.training import Examples, TrainingReport, train_network
from fairseq.memory.sources.external import ExternalMemory, open_external
from fairseq.memory.types import ScoredPositions
from fairseq.runtime.manifest import file_digest
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.memory.combiners.config import CombinerTrainingConfig
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.tasks.data_folder import DataFolderTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CombinerRun:
    """What a combiner is trained from."""

    task: DataFolderTask
    model: TransformerLanguageModel
    checkpoint: str
    knn: KnnConfig
    key_tap: str
    config: CombinerTrainingConfig
    seed: int
    saved_by: str
    """Command that makes the datastore of such a model."""

    def open_memory(self) -> ExternalMemory:
        """The datastore. Raises: ValueError or OSError when it does not fit the model."""
        return open_external(
            self.knn,
            dim=self.model.key_dim(self.key_tap),
            key_tap=self.key_tap,
            dictionary_digest=self.task.dictionary.digest(),
            dictionary_size=len(self.task.dictionary),
            model_digest=lambda: file_digest(self.checkpoint),
            saved_by=self.saved_by,
        )

    def train(self, dataset: Any, batches: list[Any], path: str) -> TrainingReport:
        """Retrieve, train and save. Raises: ValueError or OSError for what does not fit."""
        memory = self.open_memory()
        settings = setting_of(self.knn, memory, self.key_tap)
        made_for = MadeFor(
            kind=self.config.kind,
            hidden=self.config.hidden,
            model_digest=file_digest(self.checkpoint),
            **settings,
        )
        torch.manual_seed(self.seed)
        network = made_for.build(self.config.dropout)
        facts = FactReader(network.needs, memory.store, self.model, self.key_tap)
        examples = self.retrieve(memory, facts, dataset, batches)
        report = train_network(network, examples, self.config, self.seed)
        save_combiner(network, made_for, path)
        return report

    def retrieve(self, memory: ExternalMemory, facts: FactReader, dataset: Any, batches: list[Any]) -> Examples:
        """Every target token of some batches with its neighbours, searched for at once."""
        started = time.perf_counter()
        device = next(self.model.parameters()).device
        scorer = SequenceScorer([self.model], key_tap=self.key_tap, device=device)
        scored = ScoredPositions.joined([scorer.score(batch) for batch in self.task.iterator(dataset, batches)])
        keys = scored.keys.clone()  # inference tensors take no part in training
        found = memory.candidates(memory.neighbors(keys), device)
        found = facts.with_model(facts(found, keys), keys)
        logger.info("%d target tokens and their neighbours in %.1fs", len(keys), time.perf_counter() - started)
        return Examples(found, scored.logp_N.clone(), scored.target_N.clone(), scored.block_N)
