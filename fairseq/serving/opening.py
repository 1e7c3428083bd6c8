"""From a server's options to the server: everything is opened and compared before the first request."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fairseq.hf.decoding.mixing import OpenMemory
from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.hooks.identity import vocabulary_size
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.loading import context_length, load_decoder
from fairseq.serving.app import ApiServer
from fairseq.serving.config import MIND, ModelServerConfig
from fairseq.serving.engine import Engine
from fairseq.serving.memories.minds import MindStore
from fairseq.serving.memories.stores import ServedStore, StoreSettings
from fairseq.serving.metrics import Metrics
from fairseq.serving.requests import RequestRules, StoreFacts
from fairseq.serving.texts import Codec

logger = logging.getLogger(__name__)

_LENGTH = 2048
_WINDOW = 1024


@contextlib.contextmanager
def open_server(config: ModelServerConfig, model: Any = None, tokenizer: Any = None) -> Iterator[ApiServer]:
    """The server of some options; locks and hooks are released when the block ends.

    Args:
        model: a loaded model in place of the one that the options name.
        tokenizer: its tokenizer; None for none.
    Raises: ValueError or OSError when something is missing, does not fit, or is written by another server.
    """
    if model is None:
        model, tokenizer = load_decoder(config.model, config.dtype, config.device)
    length = _max_length(config, model)
    settings = StoreSettings(
        k=config.k,
        probe=config.probe,
        min_knns=config.retomaton,
        max_knns=config.max_knns,
        writable=config.writable,
        window=min(config.window or _WINDOW, length),
    )
    with contextlib.ExitStack() as closing:
        stores: dict[str, ServedStore] = {}
        for name, prefix in config.named_stores().items():
            stores[name] = ServedStore(name, prefix, model, tokenizer, settings)
            closing.callback(stores[name].close)
        mind = None
        if config.extended_mind is not None:
            path, writable = config.extended_mind, config.writable
            mind = MindStore(MIND, path, model, tokenizer, topk=config.topk, writable=writable)
            closing.callback(mind.close)
        kinds = sorted({store.key_type for store in stores.values()}) or [KeyType.final_hidden]
        decoder = RowDecoder(model, kinds)
        closing.callback(decoder.close)
        # Two: a request's long text must not keep the engine waiting for the tokenizer.
        codec, engine_codec, metrics = Codec(tokenizer), Codec(copy.deepcopy(tokenizer)), Metrics()
        _log_missing_text(config, codec, stores)
        memories = {name: _memory_of(store) for name, store in stores.items()}
        engine = Engine(
            decoder, engine_codec, memories, metrics, max_batch=config.max_batch, max_waiting=config.max_waiting
        )
        rules = RequestRules(
            model=config.model_name or Path(config.model).name,
            codec=codec,
            vocabulary=vocabulary_size(model),
            max_length=length,
            max_choices=config.max_batch,
            max_prompts=min(config.max_waiting, 64),
            stores={name: _facts_of(store) for name, store in stores.items()},
            weight=config.weight,
            temperature=config.knn_temp,
            has_mind=mind is not None,
            max_k=config.max_k,
        )
        yield ApiServer(engine, rules, stores, mind, metrics, max_body=config.max_body)


def _max_length(config: ModelServerConfig, model: Any) -> int:
    own = context_length(model)
    if own is not None and config.max_length is not None and config.max_length > own:
        raise ValueError(f"--max-length {config.max_length} is above the {own} tokens that the model reads; lower it")
    return config.max_length or own or _LENGTH


def _memory_of(store: ServedStore) -> Callable[[], OpenMemory]:
    return lambda: store.memory


def _facts_of(store: ServedStore) -> Callable[[], StoreFacts]:
    return lambda: StoreFacts(store.default_k, store.store.num_alive)


def _log_missing_text(config: ModelServerConfig, codec: Codec, stores: dict[str, ServedStore]) -> None:
    if codec.tokenizer is None:
        logger.warning(
            "%s has no tokenizer: prompts must be lists of token ids, and texts are shown as token ids", config.model
        )
    for name, store in stores.items():
        if not store.has_documents:
            logger.warning("store %s does not record documents: offsets of its neighbours are row numbers", name)
