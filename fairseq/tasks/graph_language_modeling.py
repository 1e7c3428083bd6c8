"""Next-token prediction with the neighbours of every token at hand (GNN-LM, arXiv 2110.08743)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fairseq.config import flag_names, to_dict
from fairseq.data.dictionary import Dictionary
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.memory.datastore.config import SAVES_TEXT
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.gnn.cached import CachedStates, StateSource, store_states
from fairseq.memory.gnn.config import DEFAULT_BAND
from fairseq.memory.gnn.features import CodedFeatures, KeyFeatures, NodeFeatures
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.neighbors import SplitNeighbors
from fairseq.memory.retrieval.file import store_digest
from fairseq.models.graph_lm import GraphLanguageModel
from fairseq.runtime.manifest import file_digest
from fairseq.tasks.configs import GraphLanguageModelingConfig, GraphStoresConfig
from fairseq.tasks.data_folder import Collating, IntArray
from fairseq.tasks.graph_batches import NeighborReader, TextRows, require_same_rows
from fairseq.tasks.language_modeling import LanguageModelingTask

logger = logging.getLogger(__name__)

TRAIN = "train"
_SAVED_BY, _LM, _SEARCHES = "stores_model_digest", "lm_digest", "searches"


class GraphBlocks(MonolingualDataset):
    """Blocks of a split that know where its neighbours are."""

    def __init__(self, blocks: MonolingualDataset, make_reader: Callable[[MonolingualDataset], NeighborReader]) -> None:
        super().__init__(blocks.blocks, blocks.pad, blocks.eos, blocks.bos)
        self._make_reader = make_reader

    @cached_property
    def reader(self) -> NeighborReader:
        """Reads the neighbours of these blocks; made when the model is known. Raises: ValueError or OSError."""
        return self._make_reader(self)


class GraphLanguageModelingTask(LanguageModelingTask):
    """A data folder, and a datastore with neighbours for each of its splits."""

    config: GraphLanguageModelingConfig

    def __init__(self, config: GraphLanguageModelingConfig, dictionary: Dictionary | None = None) -> None:
        """Open the datastore of the train split, and its features.

        Raises: ValueError or OSError when a file is missing, damaged or of something else.
        """
        super().__init__(config, dictionary)
        if len(self.folders) > 1:
            raise ValueError(f"--graph-stores holds the stores of one data folder, {config.data} names several")
        self.train_store = self._store(TRAIN)
        self.features, self._feature_tap = self._open_features()
        self._models: list[GraphLanguageModel] = []
        self._waiting: list[GraphBlocks] = []  # for the models
        self._lm_digest: str | None = None  # of the checkpoint that the language model within is of
        self._resumed: tuple[str, Mapping[str, Any]] | None = None  # a checkpoint, and how its neighbours were searched
        self._searches: dict[str, dict[str, Any]] = {}  # how those of each split were

    def _path(self, name: str) -> str:
        return os.path.join(str(self.config.graph_stores), name)

    def _store(self, split: str) -> Datastore:
        if not os.path.isdir(str(self.config.graph_stores)):
            raise ValueError(
                f"--graph-stores: no folder {self.config.graph_stores!r}; name the one that holds the splits' "
                "datastores and their neighbours"
            )
        return self._opened(self._path(split))

    def _opened(self, prefix: str) -> Datastore:
        store = Datastore.open(prefix)
        return store.require(dictionary_digest=self.dictionary.digest(), dictionary_size=len(self.dictionary))

    def _open_features(self) -> tuple[NodeFeatures, str | None]:
        """What is read of train positions, and which inner state that is, where it is recorded."""
        named, own_tap = self.config.graph_features, self.train_store.metadata.get("key_tap")
        if named is None:
            return KeyFeatures.of(self.train_store), own_tap
        if (coded := CodedFeatures.with_codec(named, self.train_store)) is not None:
            return coded, own_tap
        store = self._opened(named)
        if len(store) != len(self.train_store):
            raise ValueError(
                f"--graph-features {named} has {len(store)} rows, the train split's datastore {self._path(TRAIN)} has "
                f"{len(self.train_store)}; save both from the same text, with the same --context-window"
            )
        require_same_rows(store, self.train_store)
        saved, own = store.metadata.get("model_digest"), self._saved_by
        if None not in (saved, own) and saved != own:
            logger.warning(
                "--graph-features %s were saved by another model (digest %s) than %s (digest %s)",
                named, str(saved)[-12:], self.train_store.prefix, str(own)[-12:],
            )  # fmt: skip
        return KeyFeatures.of(store), store.metadata.get("key_tap")

    def model_limits(self) -> dict[str, int]:
        """See the base class."""
        return super().model_limits() | {"graph_feature_dim": self.features.dim}

    def attach(self, models: Sequence[Any], *, trains: bool) -> None:
        """See the base class."""
        for model in models:
            if not isinstance(model, GraphLanguageModel):
                raise ValueError(
                    "the task is graph_language_modeling, and the model reads no neighbours; give --arch "
                    "transformer_lm_gnn, or --task language_modeling"
                )
            if model.gnn.feature_dim != self.features.dim:
                raise ValueError(
                    f"the graph's layers read features of width {model.gnn.feature_dim}, those of --graph-stores are "
                    f"of width {self.features.dim}; give the stores of the model's own language model"
                )
        if len({model.gnn.num_layers for model in models}) > 1:
            raise ValueError("the models of --path have graphs of different --graph-layer; evaluate them one by one")
        if trains and self.config.graph_states:
            raise ValueError(
                "--graph-states are those of fixed weights; training computes them from the features: leave it out"
            )
        for model in models:
            model.states_are_given = self.config.use_precompute_feat
            if trains and model.config.short_cut:
                raise ValueError("--short-cut leaves the graph out, so that nothing of it is trained; leave it out")
            if trains and self.config.use_precompute_feat and model.moves_language_model:
                raise ValueError(
                    f"--use-precompute-feat takes the language model's states as they were saved, and --train-params "
                    f"{model.config.train_params} changes it; give --no-use-precompute-feat, or --train-params gnn"
                )
        if self.config.use_precompute_feat:
            self._require_outputs(models)
        self._models = list(models)
        for blocks in self._waiting:
            _ = blocks.reader
        self._waiting.clear()

    def check_start(self, path: str | None, config: Mapping[str, Any], *, resumes: bool) -> None:
        """See the base class; the language model within has to be trained, and the one that saved the stores."""
        trained, of_graph = self._models[0].config.train_params, config.get("task", {})
        if path is None and trained != "all":
            raise ValueError(
                f"--train-params {trained} leaves the language model as it is, and it was never trained; give "
                "--finetune-from-model CHECKPOINT, or --train-params all"
            )
        if path is None:
            return
        if resumes and of_graph.get("name") == "graph_language_modeling":
            self._require_same_graph(path, of_graph)
            self._resumed = path, of_graph.get(_SEARCHES, {})
        digest = of_graph[_LM] if _LM in of_graph else file_digest(path)
        self._warn_of_other_stores(path, digest or of_graph.get(_SAVED_BY))
        self._lm_digest = digest

    def _require_same_graph(self, path: str, before: Mapping[str, Any]) -> None:
        """Raise ValueError for a run that would go on with other neighbours, or other things read of them."""
        now = to_dict(self.config) | self.facts_of_model()
        names = {field.name: flag_names(field)[0] for field in dataclasses.fields(GraphStoresConfig)}
        names = {name: flag for name, flag in names.items() if name not in ("graph_stores", "graph_features")}
        names |= {"add_bos_token": "--add-bos-token", "features": "the content of --graph-features"}
        for name, flag in names.items():
            if name in before and before[name] != now[name]:
                raise ValueError(
                    f"{path} was trained with {flag} {before[name]}, now it is {now[name]}: give the former, or "
                    "another --save-dir (--finetune-from-model starts another stage from it)"
                )

    def _require_same_search(self, split: str, neighbors: SplitNeighbors) -> None:
        """Note how a split's neighbours were searched; raise ValueError for a run that began with other ones."""
        now = {"k": self.config.gcn_k or neighbors.k, **neighbors.search}
        self._searches[split] = now
        path, searches = self._resumed or ("", {})
        before = searches.get(split, now)
        for name in [*now, *sorted(before.keys() - now.keys())]:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained with neighbours of {split} whose {name} is {before.get(name)!r}, that of "
                    f"{neighbors.path} is {now.get(name)!r}: search again as before, or give another --save-dir "
                    "(--finetune-from-model starts another stage from it)"
                )

    @property
    def _saved_by(self) -> str | None:
        """Digest of the language model that saved the stores."""
        found: str | None = self.train_store.metadata.get("model_digest")
        return found

    def facts_of_model(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "graph_stores": os.path.abspath(str(self.config.graph_stores)),
            _SAVED_BY: self._saved_by,
            _LM: None if self._models[0].moves_language_model else self._lm_digest,
            "feature_tap": self._feature_tap,
            "features": self.features.digest,
            _SEARCHES: self._searches,
        }

    def check_checkpoint(self, path: str, trained: Mapping[str, Any]) -> None:
        """See the base class; warns of stores of another language model than the one within."""
        tap = trained.get("feature_tap")
        if None not in (tap, self._feature_tap) and tap != self._feature_tap:
            raise ValueError(
                f"{path} was trained with features that are {tap}, those of --graph-stores or --graph-features are "
                f"{self._feature_tap}; give stores saved with --knn-keytype {tap}"
            )
        if self.config.use_precompute_feat and _LM in trained and trained[_LM] is None:
            raise ValueError(
                f"--use-precompute-feat: the language model in {path} was trained too, and the stores hold states that "
                "it had before; give --no-use-precompute-feat"
            )
        self._warn_of_other_stores(path, trained.get(_LM) or trained.get(_SAVED_BY))

    def _warn_of_other_stores(self, path: str, digest: str | None) -> None:
        saved = self._saved_by
        if None not in (digest, saved) and digest != saved:
            logger.warning(
                "the language model of %s (digest %s) is not the one that saved %s (digest %s): its states may lie "
                "elsewhere; give the stores that it was trained with, or save some with it",
                path, str(digest)[-12:], self.train_store.prefix, str(saved)[-12:],
            )  # fmt: skip

    def facts(self, split: str) -> dict[str, Any]:
        """See the base class."""
        config, neighbors = self.config, self._neighbors(split, self._store(split))
        names = ("neighbor_context", "band", "exclude_own_document", "stop_at_documents", "windows_cross_band")
        more = ("graph_builder", "gcn_k", "gcn_context_window", "use_precompute_feat")
        values = [getattr(config, name) for name in (*names, *more)]
        kept = None if config.graph_states is None else "states"
        return {"graph": [repr(values), neighbors.digest, self.features.digest, kept]}

    def _require_outputs(self, models: Sequence[GraphLanguageModel]) -> None:
        """Raise ValueError unless the stores hold what --use-precompute-feat takes from them."""
        store = self.train_store
        tap, dim = store.metadata.get("key_tap", "model_output"), models[0].decoder.output_width
        if tap not in ("model_output", "lm_output") or store.dim != dim:
            raise ValueError(
                f"--use-precompute-feat takes the language model's output of width {dim} from {store.prefix}, which "
                f"holds {tap} of width {store.dim}; save the stores with --knn-keytype model_output"
            )

    def blocks(
        self, split: str, block_size: int | None = None, epoch: int = 1, *, combine: bool = False
    ) -> GraphBlocks:
        """The blocks of a split with its neighbours, which are opened when the models are known.

        Raises: ValueError or OSError as the base class, and when the split's datastore or neighbours are missing or
            of something else.
        """
        if combine and self.numbered_after(split):
            raise ValueError(
                f"the data folder holds {split} and {self.numbered_after(split)[0]}, and --graph-stores one text for "
                "each split; join the texts and run preprocess.py again"
            )
        blocks = super().blocks(split, block_size, epoch)
        result = GraphBlocks(blocks, functools.partial(self._reader, split))
        if self._models:
            _ = result.reader
        else:
            self._waiting.append(result)
        return result

    def _reader(self, split: str, blocks: MonolingualDataset) -> NeighborReader:
        config, train = self.config, self.train_store
        store = self._store(split)
        is_train = store_digest(store) == store_digest(train)
        neighbors = self._neighbors(split, store)
        if config.gcn_k is not None:
            neighbors.require(config.gcn_k)
        self._require_same_search(split, neighbors)
        self._require_text(split, store)
        rows = TextRows(store, blocks.blocks)
        if config.use_precompute_feat:
            self._require_all_tokens(rows, store, blocks)
        if is_train and config.graph_states:
            raise ValueError(
                f"--graph-states: split {split} is the train split, whose windows end where its band begins; leave "
                "the flag out for it"
            )
        if is_train:
            band = config.band if config.band is not None else int(neighbors.made_of.get("band", DEFAULT_BAND))
            config = dataclasses.replace(config, band=band)
        return NeighborReader(
            rows=rows,
            neighbors=neighbors,
            k=config.gcn_k or neighbors.k,
            build=self._builder(config),
            features=self.features,
            is_train=is_train,
            context=config.gcn_context_window,
            hidden=store if config.use_precompute_feat else None,
            cached=self._cached_states() if config.graph_states else None,
            device=lambda: next(self._models[0].parameters()).device,
        )

    def _builder(self, config: GraphLanguageModelingConfig) -> GraphBuilder:
        needs_documents = config.stop_at_documents or config.exclude_own_document
        documents = self.train_store.documents if needs_documents and self.train_store.has_documents else None
        return GraphBuilder(config, self._models[0].gnn.num_layers, len(self.train_store), documents)

    def _cached_states(self) -> CachedStates:
        """The states of all train positions, from disk; computed first where they are not there."""
        if len(self._models) > 1:
            raise ValueError(f"--graph-states are those of one model, --path names {len(self._models)}")
        source = StateSource(self._models[0].gnn, self.features, self._builder(self.config))
        return store_states(source, str(self.config.graph_states))

    def _neighbors(self, split: str, store: Datastore) -> SplitNeighbors:
        path, train = self._path(f"{split}.neighbors"), self.train_store
        neighbors = SplitNeighbors.open(path, train=train, num_tokens=len(store))
        neighbors.require_split(store)
        return neighbors

    def _require_text(self, split: str, store: Datastore) -> None:
        saved = store.metadata.get("text_digest")
        if saved is None:
            return
        digest = file_digest(f"{self.prefix(split)}.bin")
        if saved != digest:
            raise ValueError(
                f"datastore {store.prefix!r} was saved from another text (digest {saved[-12:]}) than {split} of "
                f"{self.folders[0]} (digest {digest[-12:]}); save it again from this data folder ({SAVES_TEXT})"
            )

    def _require_all_tokens(self, rows: TextRows, store: Datastore, blocks: MonolingualDataset) -> None:
        """Raise ValueError for a token whose state is not there."""
        if blocks.bos is not None:
            raise ValueError(
                "--use-precompute-feat: no datastore holds the state of <s>, which --add-bos-token puts before each "
                "block; give --no-use-precompute-feat"
            )
        ends_B = blocks.blocks.starts + blocks.blocks.sizes - 1
        place_N = np.concatenate([blocks.blocks.starts, ends_B])
        missing_N = rows.find(place_N) < 0
        num_tokens = int(blocks.blocks.sizes.sum())
        if missing_N.any() or num_tokens > len(store):
            which = f"token {place_N[missing_N].min()}" if missing_N.any() else f"{num_tokens - len(store)} tokens"
            raise ValueError(
                f"--use-precompute-feat: {store.prefix} has no state of {which}; save it with --dstore-all-tokens "
                f"({SAVES_TEXT}), or give --no-use-precompute-feat"
            )

    def _warn_of_leaks(self, reader: NeighborReader, context_window: int) -> None:
        """Warn of a band in which neighbours have read what they help to predict."""
        read = self.train_store.metadata.get("longest_input")
        if not (reader.is_train and isinstance(read, int)):
            return
        config = reader.build.config
        before = context_window if reader.context is None else min(context_window, reader.context)
        block = self.config.tokens_per_sample + before
        safe = config.safe_band(read, block)
        if config.nearest < safe:
            logger.warning(
                "neighbours of the train split from %d tokens on are taken, and may have read what they help to "
                "predict: its keys have read up to %d tokens, a block and its context have %d; "
                "--invalid-neighbor-context %d is safe",
                config.nearest, read, block, safe,
            )  # fmt: skip
        elif reader.neighbors.searched_band < safe:
            logger.warning(
                "keys nearer than %d tokens competed with the neighbours of the train split and were dropped later: "
                "which are left depends on what those have read, and that may be what they help to predict; search "
                "again with fairseq-neighbors --invalid-neighbor-context %d, without --no-replacement",
                config.nearest, safe,
            )  # fmt: skip

    def iterator(self, dataset: Collating, batches: list[IntArray], **more: Any) -> EpochBatchIterator:
        """See the base class; the batches hold their neighbours."""
        blocks: Any = getattr(dataset, "dataset", dataset)
        reader: NeighborReader = blocks.reader
        self._warn_of_leaks(reader, int(getattr(dataset, "context_window", 0)))
        return super().iterator(_WithNeighbors(dataset, reader), batches, **more)


@dataclasses.dataclass(frozen=True)
class _WithNeighbors:
    """A data set whose batches hold their neighbours."""

    dataset: Any
    reader: NeighborReader

    def collate(self, indices: Any) -> Any:
        """The batch of these blocks."""
        with torch.inference_mode(False), torch.no_grad():
            return self.reader.read(self.dataset.collate(indices), self.dataset.places(indices))
