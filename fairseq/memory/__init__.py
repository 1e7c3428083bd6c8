"""Memories of language models: datastores, indexes, sources of candidates and ways to combine them with a model.

The names below are the public interface; everything else may change without notice. They are imported when used.
"""

from typing import TYPE_CHECKING

from fairseq.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from fairseq.memory.combiners.interpolation import Interpolation
    from fairseq.memory.combiners.joint import JointNormalization
    from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.datastore.describe import StoreHints
    from fairseq.memory.datastore.writer import DatastoreWriter
    from fairseq.memory.index.build.build import build_index
    from fairseq.memory.index.build.config import BuildConfig
    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.index.faiss.index import FaissIndex
    from fairseq.memory.index.opening import open_index
    from fairseq.memory.retomaton.automaton import Retomaton
    from fairseq.memory.scoring import knn_logp
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.sources.local import LocalMemory
    from fairseq.memory.sources.rolling import RollingMemory
    from fairseq.memory.trime.joint_loss import InBatchMemory, joint_loss
    from fairseq.memory.types import Candidates, MemoryReader, Metric, Neighbors, Passage, ScoredPositions

__all__ = [
    "BuildConfig",
    "Candidates",
    "Datastore",
    "DatastoreWriter",
    "ExactIndex",
    "ExternalMemory",
    "FaissIndex",
    "InBatchMemory",
    "Interpolation",
    "JointNormalization",
    "LocalMemory",
    "MemoryReader",
    "Metric",
    "Neighbors",
    "Passage",
    "Retomaton",
    "RollingMemory",
    "ScoredPositions",
    "StoreHints",
    "VocabularyMixer",
    "build_index",
    "joint_loss",
    "knn_logp",
    "open_index",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BuildConfig": "fairseq.memory.index.build.config",
        "Candidates": "fairseq.memory.types",
        "Datastore": "fairseq.memory.datastore.datastore",
        "DatastoreWriter": "fairseq.memory.datastore.writer",
        "ExactIndex": "fairseq.memory.index.exact.index",
        "ExternalMemory": "fairseq.memory.sources.external",
        "FaissIndex": "fairseq.memory.index.faiss.index",
        "InBatchMemory": "fairseq.memory.trime.joint_loss",
        "Interpolation": "fairseq.memory.combiners.interpolation",
        "JointNormalization": "fairseq.memory.combiners.joint",
        "LocalMemory": "fairseq.memory.sources.local",
        "MemoryReader": "fairseq.memory.types",
        "Metric": "fairseq.memory.types",
        "Neighbors": "fairseq.memory.types",
        "Passage": "fairseq.memory.types",
        "Retomaton": "fairseq.memory.retomaton.automaton",
        "RollingMemory": "fairseq.memory.sources.rolling",
        "ScoredPositions": "fairseq.memory.types",
        "StoreHints": "fairseq.memory.datastore.describe",
        "VocabularyMixer": "fairseq.memory.combiners.vocab_mixing",
        "build_index": "fairseq.memory.index.build.build",
        "joint_loss": "fairseq.memory.trime.joint_loss",
        "knn_logp": "fairseq.memory.scoring",
        "open_index": "fairseq.memory.index.opening",
    },
)
