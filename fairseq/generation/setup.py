"""Models, text and memory of a generation command, opened and checked against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fairseq.checkpoint_utils import load_checkpoint
from fairseq.data.bm25.similar_pairs import SimilarSources
from fairseq.generation.config import GenerateConfig, GenerationConfig, StepMemoryConfig
from fairseq.generation.next_token import NeighborMemory
from fairseq.generation.sentence_memory import SentenceMemory
from fairseq.generation.sequence_generator import SequenceGenerator
from fairseq.memory.combiners.facts import FactReader
from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.combiners.joint import JointNormalization, WholeMemoryAdded
from fairseq.memory.combiners.learned import LearnedCombiner, LearnedWeighting
from fairseq.memory.combiners.learned_files import load_combiner
from fairseq.memory.combiners.nearest_distance import NearestDistance
from fairseq.memory.combiners.vocab_mixing import FixedWeighting, JointWeighting, VocabularyMixer, Weighting
from fairseq.memory.datastore.describe import require_some_store
from fairseq.memory.index.faiss.index import find_index
from fairseq.memory.retrieval.file import store_digest
from fairseq.memory.sources.external import open_external
from fairseq.memory.types import Metric
from fairseq.runtime.manifest import file_digest
from fairseq.tasks.translation import TranslationTask

if TYPE_CHECKING:
    from fairseq.memory.combiners.base import Combiner
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.runtime.config import RuntimeConfig
    from fairseq.tasks.data_folder import DataFolderTask


@dataclass(frozen=True)
class StepMemorySettings:
    """What a memory is opened from."""

    memory: StepMemoryConfig
    knn: KnnConfig
    saved_by: str
    """Command that makes the datastore of such a model."""

    def check(self) -> None:
        """Raise ValueError for options that contradict each other, before anything is loaded."""
        memory, knn = self.memory, self.knn
        if not memory.knnmt:
            for name in ("dstore_filename", "indexfile"):
                if getattr(knn, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(knn, name)} is read with --knnmt: give it too"
                    )
            return
        by_distance = knn.faiss_metric_type != "ip" and knn.similarity != "dot"
        if memory.knn_lambda_type == "distance" and not by_distance:
            raise ValueError(
                f"--knn-lambda-type distance is about distances, the index's metric is {knn.faiss_metric_type}; build "
                "the index with --dist l2, or leave --knn-lambda-type out"
            )
        if memory.sentence_pairs:
            self._check_sentence_pairs()
            return
        if not knn.dstore_filename:
            raise ValueError("--knnmt needs --dstore-filename: which datastore is searched is not known otherwise")
        if memory.knn_lambda_type == "trime" and by_distance:
            raise ValueError(
                f"--knn-lambda-type trime is about inner products, the index's metric is {knn.faiss_metric_type}: the "
                "farther a neighbour, the more it would count. Build the index with --dist ip and give "
                "--faiss-metric-type ip, or leave --knn-lambda-type out"
            )
        require_some_store(knn.dstore_filename, self.saved_by)
        if knn.indexfile and knn.search_on is None:
            find_index(knn.indexfile, Metric.parse(knn.faiss_metric_type))

    def _check_sentence_pairs(self) -> None:
        for name in ("dstore_filename", "indexfile"):
            if getattr(self.knn, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self.knn, name)} and --sentence-pairs "
                    f"{self.memory.sentence_pairs} are two memories; leave one of them out"
                )
        if self.memory.knn_lambda_type == "trime":
            raise ValueError("--sentence-pairs takes distances; give --knn-lambda-type distance or fix, not trime")

    def combiner(self, dim: int, memory: NeighborMemory) -> Combiner:
        """The same for given targets."""
        if isinstance(memory.mixer.weighting, LearnedWeighting):
            return LearnedCombiner(memory.mixer.weighting.network)
        if self.memory.compat_trime_mass:
            return WholeMemoryAdded(dim, self.knn.temperature)
        if self.memory.knn_lambda_type == "trime":
            return JointNormalization(dim, self.knn.temperature)
        return Interpolation(self.knn.weight, self.knn.temperature)

    def weighting(self, dim: int, now: Mapping[str, Any]) -> Weighting:
        """How much of each step's distribution the neighbours get.

        Args:
            now: what a learned combiner must have been trained for.
        """
        if self.memory.combiner:
            network, made_for = load_combiner(self.memory.combiner)
            made_for.require(self.memory.combiner, now, strict=self.knn.strict_model)
            return LearnedWeighting(network)
        if self.memory.knn_lambda_type == "distance":
            return LearnedWeighting(NearestDistance(self.knn.num_neighbors, self.knn.temperature))
        if self.memory.knn_lambda_type == "trime":
            return JointWeighting(dim, self.knn.temperature, adds_up=not self.memory.compat_trime_mass)
        return FixedWeighting(self.knn.weight, self.knn.temperature)


def require_checkpoints(config: GenerateConfig) -> None:
    """Raise ValueError for a checkpoint that is missing."""
    for path in config.paths:
        if not os.path.isfile(path):
            raise ValueError(f"--path: no checkpoint at {path!r}")


def open_models(
    config: GenerateConfig, task: DataFolderTask, overrides: dict[str, Any], runtime: RuntimeConfig
) -> list[TransformerLanguageModel]:
    """The models of --path. Raises: ValueError or OSError when one does not fit the data."""
    return [task.load_model(load_checkpoint(path), path, overrides, runtime) for path in config.paths]


def open_memory(
    settings: StepMemorySettings, config: GenerateConfig, task: DataFolderTask, model: TransformerLanguageModel
) -> NeighborMemory | SentenceMemory | None:
    """What --knnmt searches as part of each step; None without it.

    Raises: ValueError or OSError with both values and the way out when it is not of this model.
    """
    if not settings.memory.knnmt:
        return None
    if len(config.paths) > 1:
        raise ValueError(f"--knnmt: keys come from one model, --path names {len(config.paths)}; give the store's own")
    tap = settings.memory.knn_keytype or ("last_ffn_input" if task.source is None else "model_output")
    if settings.memory.sentence_pairs:
        return _sentence_memory(settings, task, model, tap)
    dim = model.key_dim(tap)
    digest = cache(lambda: file_digest(config.paths[0]))
    memory = open_external(
        settings.knn,
        dim=dim,
        key_tap=tap,
        dictionary_digest=task.dictionary.digest(),
        dictionary_size=len(task.dictionary),
        model_digest=digest,
        saved_by=settings.saved_by,
    )
    now = {"kind": settings.memory.knn_lambda_type} | setting_of(settings.knn, memory, tap)
    weighting = settings.weighting(dim, now | {"model_digest": digest()} if settings.memory.combiner else now)
    facts = None
    if isinstance(weighting, LearnedWeighting) and weighting.network.needs:
        facts = FactReader(weighting.network.needs, memory.store, model, tap)
    return NeighborMemory(memory, VocabularyMixer(weighting), tap, facts)


def _sentence_memory(
    settings: StepMemorySettings, task: DataFolderTask, model: TransformerLanguageModel, tap: str
) -> SentenceMemory:
    """The pairs of --sentence-subset. Raises: ValueError for a task or a split without pairs."""
    subset = settings.memory.sentence_subset
    if not isinstance(task, TranslationTask):
        raise ValueError("--sentence-pairs finds pairs of sentences, this task has none; give --task translation")
    dataset = task.blocks(subset)
    if dataset.target_side is None:
        raise ValueError(f"--sentence-subset {subset} has sources alone; name a split with translations")
    mixer = VocabularyMixer(settings.weighting(model.key_dim(tap), {}))
    return SentenceMemory(
        model,
        dataset,
        SimilarSources(dataset.source_side.sentences),
        mixer,
        key_tap=tap,
        num_pairs=settings.memory.sentence_pairs,
        k=settings.knn.num_neighbors,
    )


def setting_of(knn: KnnConfig, memory: ExternalMemory, key_tap: str) -> dict[str, Any]:
    """What decides the scores that a learned combiner reads, by the names of ``MadeFor``."""
    return {
        "k": knn.num_neighbors,
        "temperature": knn.temperature,
        "dim": memory.store.dim,
        "key_tap": key_tap,
        "metric": knn.faiss_metric_type,
        "similarity": knn.similarity,
        "store_digest": store_digest(memory.store),
    }


def open_generator(
    generation: GenerationConfig,
    settings: StepMemorySettings,
    config: GenerateConfig,
    task: DataFolderTask,
    models: list[TransformerLanguageModel],
) -> SequenceGenerator:
    """The generator of a command. Raises: ValueError or OSError for a memory that does not fit."""
    memory = open_memory(settings, config, task, models[0])
    return SequenceGenerator(models, task.dictionary, generation, memory)
