"""--save-retrieval with --score-reference: the neighbours of every token of the references, kept for a sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.memory.retrieval.made_of import facts_of_model, facts_of_search, facts_of_text, place_of_store
from fairseq.memory.retrieval.writer import RetrievalWriter, existing

if TYPE_CHECKING:
    from fairseq.generation.config import GenerateConfig
    from fairseq.generation.next_token import NeighborMemory
    from fairseq.generation.setup import StepMemorySettings
    from fairseq.memory.retrieval.file import Retrieval, SavedPart
    from fairseq.memory.types import Array, Candidates, ScoredPositions
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.tasks.data_folder import DataFolderTask

logger = logging.getLogger(__name__)


class KeptNeighbors:
    """Tokens with their neighbours: those that the file holds already, then a place for the others."""

    def __init__(self, held: Retrieval | None, num_held: int, writer: RetrievalWriter | None) -> None:
        """Args.

        num_held: rows of ``held`` that mean something, which are whole batches.
        writer: takes the others; None where the file is complete.
        """
        self._held, self._num_held, self._writer = held, num_held, writer
        self._at = 0

    def next_saved(self, count: int) -> SavedPart | None:
        """The next ``count`` tokens if they are there."""
        rows = slice(self._at, self._at + count)
        if self._held is None or rows.stop > self._num_held:
            return None
        self._at = rows.stop
        return self._held.part(rows)

    def append(self, scored: ScoredPositions, found: Candidates) -> None:
        """Keep the tokens of a batch."""
        assert self._writer is not None, "the file is complete"
        continues_N = np.zeros(len(scored.target_N), dtype=bool)
        columns = (scored.block_N, scored.target_N, continues_N, scored.logp_N, scored.norm_N)
        self._writer.append(*columns, None, found)


@contextmanager
def keeping_neighbors(
    config: GenerateConfig,
    settings: StepMemorySettings,
    task: DataFolderTask,
    memory: NeighborMemory,
    examples: tuple[Any, Sequence[Array]],
    *,
    model: TransformerLanguageModel,
    overrides: dict[str, Any],
    program: str,
) -> Iterator[KeptNeighbors]:
    """The file of --save-retrieval while its batches are scored; it is complete when the block ends without an error.

    Args:
        examples: the data set, and the batches of it that are scored.
        overrides: settings of the model that replace the checkpoint's.
        program: name of the command.
    Raises: ValueError or OSError for a file that holds anything else, or where there is no place, before any scoring.
    """
    path = str(config.save_retrieval)
    dataset, batches = examples
    if not batches:
        raise ValueError(
            f"--save-retrieval {path}: shard {config.shard_id} of {config.num_shards} holds no batch; lower "
            "--num-shards"
        )
    sizes = getattr(dataset, "target_sizes", dataset.sizes)
    # Sources may be cut: their sizes tell it, those of the pairs may not.
    read = [sizes, getattr(dataset, "source_sizes", dataset.sizes)]
    joint = settings.memory.knn_lambda_type == "trime"
    fingerprint: dict[str, Any] = {
        "joint": joint,
        "subset": config.gen_subset,
        "shard": [config.shard_id, config.num_shards],
        **facts_of_text(task.prefixes(config.gen_subset), batches, task.dictionary, read),
        **facts_of_model(config.paths[0], model, overrides, memory.key_tap),
        **facts_of_search(memory.memory, settings.knn.probe),
    }
    about = {
        "program": program,
        "path": os.path.abspath(config.paths[0]),
        "dictionary": os.path.abspath(task.dictionary_path),
        **place_of_store(memory.memory),
        "temperature": settings.knn.temperature,
        **({} if joint else {"weight": settings.knn.weight}),
    }
    held = existing(path, fingerprint)
    if held is not None:
        logger.info("%s holds these neighbours already: nothing is searched", path)
        yield KeptNeighbors(held, len(held), None)
        return
    writer = RetrievalWriter(
        path,
        sum(int(sizes[batch].sum()) for batch in batches),
        memory.memory.k,
        num_types=len(task.dictionary),
        num_rows=len(memory.memory.store),
        text_sums=False,
        fingerprint=fingerprint,
        about=about,
    )
    with writer:
        done = writer.rows_done
        if done:
            logger.info("resuming at token %d of %d", done, writer.num_tokens)
        yield KeptNeighbors(writer.saved() if done else None, done, writer)
        writer.finish()
    logger.info("%s: %d tokens with %d neighbours each", path, writer.num_tokens, memory.memory.k)
