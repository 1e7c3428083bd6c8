"""Memories of a text: its keys and values in every layer, as the model makes them in windows over the text.

Keys are kept as if every memory stood at one position (``origin``), or at its own place before the local text
(``relative``): each attention module is run a second time, up to its keys, with position embeddings of those positions.
That way no architecture's rotation has to be known here.

Shapes: B windows of a batch, T tokens of a window, S memories, N tokens, G key-value heads, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn

from fairseq.hf.attention.attention_sites import AttentionCall, Sites, evaluating, find_sites, taken_over
from fairseq.hf.hooks.inner_model import check_is_loaded
from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.extended_mind.storage import LayerStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MemorySource = Union[str, Tensor, Sequence[int], Sequence["str | Tensor | Sequence[int]"]]  # noqa: UP007 - a name in it
"""Token ids (a list, (N,) or (1, N)), a text, or a list of either: documents, none of which sees another."""

_BATCH_TOKENS = 4096
_SAMPLES = 16
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_NO_LIMIT = 1 << 62


def build_memory(
    model: PreTrainedModel,
    source: MemorySource,
    *,
    tokenizer: Tokenizer | None = None,
    settings: MindSettings | None = None,
    sites: Sites | None = None,
    batch_size: int | None = None,
    keep: str = "all",
    folder: str | None = None,
    add_first_token: bool = True,
) -> Memory:
    """Let the model read a text and keep what its layers remember.

    Args:
        source: see ``MemorySource``.
        tokenizer: needed for text.
        add_first_token: read each text (not token ids) after the token that the model's texts begin with, where the
            tokenizer adds none; without this attention sink memories are weaker. It is not part of the memory.
        batch_size: windows that are read at once; by default as many as have 4096 tokens.
        keep: ``all``, or ``newest`` to read only the last ``settings.limit`` tokens of a longer text, with a warning.
        folder: where files are made that keys and values are written to window by window, so that they are never in
            memory together. They are the memory's as long as it lives.
    Raises: ValueError for a text that is empty or longer than allowed, for tokens outside the vocabulary, and for a
        model whose weights are offloaded.
    """
    check_is_loaded(model)
    settings, sites = settings or MindSettings(), sites or find_sites(model)
    vocabulary = input_vocabulary(model)
    documents = [_checked(ids, vocabulary) for ids in token_documents(source, tokenizer)]
    first = first_token(model, tokenizer) if add_first_token else None
    begins_with = [first if is_text else None for is_text in texts_in(source)]
    special = special_ids(model, tokenizer, settings) if settings.remove_special_ids else ()
    documents = _within(documents, settings.limit, keep)
    reading = _Reading.of(documents, begins_with[len(begins_with) - len(documents) :], special)
    token_N = torch.cat(documents)
    context = context_length(model)
    reach = max(1, (context or _NO_LIMIT) // 2) if settings.positions == "relative" else 0
    window = min(settings.max_len, context or settings.max_len)
    stride = min(settings.stride, window)
    windows = [w for start, size in reading.documents for w in _windows(start, size, stride, window)]
    place_S = torch.nonzero(reading.kept_N[reading.is_own_N])[:, 0]
    if not len(place_S):
        raise ValueError(f"all {len(token_N)} tokens of the memory are special; give text, or remove_special_ids=False")
    recorder = _KeyValueRecorder(
        sites, settings.positions, LayerStore(len(place_S), device_of(settings, model), folder)
    )
    with taken_over(model, recorder), recorder.listening(model), evaluating(model), torch.no_grad():
        step = batch_size or max(1, _BATCH_TOKENS // window)
        for start in range(0, len(windows), step):
            _read(model, reading, windows[start : start + step], recorder, reach)
    return Memory(
        layers=recorder.layers(),
        token_N=token_N,
        place_S=place_S,
        document_starts=tuple(itertools.accumulate([0, *map(len, documents[:-1])])),
        model_digest=model_digest(model),
        positions=settings.positions,
        reach=reach,
    )


def token_documents(source: MemorySource, tokenizer: Tokenizer | None = None) -> list[Tensor]:
    """A source of memories as token ids, one tensor per document."""
    if isinstance(source, TextTokens):
        return [source.ids_N]
    if isinstance(source, str):
        if tokenizer is None:
            raise ValueError("a memory of text needs a tokenizer; give tokenizer= or token ids")
        return [torch.tensor(tokenizer(source)["input_ids"], dtype=torch.int64)]
    if isinstance(source, Tensor):
        if source.ndim == 2 and len(source) > 1:
            raise ValueError(f"a memory of shape {tuple(source.shape)} is several texts; give a list, or (1, N)")
        return [source.reshape(-1).to("cpu", torch.int64)]
    items = list(source)
    if items and all(isinstance(item, int) for item in items):
        return [torch.tensor(items, dtype=torch.int64)]
    return [ids for item in items for ids in token_documents(item, tokenizer)]  # type: ignore[arg-type]


def texts_in(source: MemorySource) -> list[bool]:
    """True for each document of a source that is a text, False for token ids."""
    if isinstance(source, (str, TextTokens)):
        return [True]
    if isinstance(source, Tensor) or all(isinstance(item, int) for item in source):
        return [False]
    return [is_text for item in source for is_text in texts_in(item)]  # type: ignore[arg-type]


def first_token(model: PreTrainedModel, tokenizer: Tokenizer | None) -> int | None:
    """The token that the model's texts begin with: beginning of sequence, or the separator of documents.

    None for a model without either. Raises: ValueError for a token outside the vocabulary.
    """
    for kind in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, model.config):
            named = getattr(owner, kind, None)
            token = named[0] if isinstance(named, (list, tuple)) and named else named
            if isinstance(token, int) and 0 <= token < input_vocabulary(model):
                return token
    return None


def _checked(ids_N: Tensor, vocabulary: int) -> Tensor:
    if not len(ids_N):
        raise ValueError("a memory of no tokens remembers nothing; give a text that is not empty")
    if int(ids_N.min()) < 0 or int(ids_N.max()) >= vocabulary:
        low, high = int(ids_N.min()), int(ids_N.max())
        raise ValueError(f"memory holds tokens from {low} to {high}; the vocabulary is 0 to {vocabulary - 1}")
    return ids_N


def _within(documents: list[Tensor], limit: int | None, keep: str) -> list[Tensor]:
    total = sum(len(ids) for ids in documents)
    if not documents:
        raise ValueError("a memory of no documents remembers nothing; give at least one")
    if limit is None or total <= limit:
        return documents
    if keep != "newest":
        raise ValueError(
            f"a memory of {total} tokens is longer than the limit of {limit}; shorten it, raise limit=, or give "
            'keep="newest" to drop the oldest'
        )
    logger.warning("memory of %d tokens: the oldest %d are dropped (limit)", total, total - limit)
    kept = torch.cat(documents)[total - limit :]
    sizes = [len(ids) for ids in documents]
    first = 0
    while total - sizes[first] >= limit:
        total -= sizes[first]
        first += 1
    sizes = sizes[first:]
    sizes[0] -= total - limit
    return [part for part in torch.split(kept, sizes) if len(part)]


def special_ids(model: PreTrainedModel, tokenizer: Tokenizer | None, settings: MindSettings) -> tuple[int, ...]:
    """Tokens whose memories are removed. Raises: ValueError for one outside the vocabulary."""
    vocabulary = input_vocabulary(model)
    given = settings.tokenizer_all_special_ids
    if given is not None:
        wrong = [number for number in given if not 0 <= number < vocabulary]
        if wrong:
            raise ValueError(f"special id {wrong[0]} is outside the vocabulary, which is 0 to {vocabulary - 1}")
        return given
    if tokenizer is not None:
        return tuple(tokenizer.all_special_ids)
    named = [getattr(model.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    flat = [number for each in named for number in (each if isinstance(each, list) else [each])]
    return tuple(number for number in flat if number is not None and 0 <= number < vocabulary)


def input_vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model has an input embedding for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model can read at once, by its config; None where the config has no such field."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


def device_of(settings: MindSettings, model: nn.Module) -> str:
    """The device that memories are kept on."""
    wanted = settings.memory_device
    return str(next(model.parameters()).device) if wanted == "model" else "cpu" if wanted == "disk" else wanted


def model_digest(model: nn.Module) -> str:
    """Digest of samples of a model's weights, the same whatever type they are loaded in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
        # In bfloat16, to which wider types of the same weights round.
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        digest.update(f"{name} {tuple(parameter.shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def _windows(first: int, size: int, stride: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, how many at the end are new) of each window over ``size`` tokens, numbered from ``first``."""
    done = 0
    for start in range(0, size, stride):
        stop = min(start + window, size)
        if stop > done:
            yield first + start, first + stop, stop - done
        done = stop
        if stop == size:
            return


@dataclass(frozen=True)
class TextTokens:
    """A document of token ids that a tokenizer made of a text."""

    ids_N: Tensor


@dataclass(frozen=True)
class _Reading:
    """The tokens that the model reads: the user's, and first tokens that were added. N counts both."""

    token_N: Tensor
    is_own_N: Tensor
    """bool: the user's tokens."""
    kept_N: Tensor
    """bool: tokens whose memories are stored; special ones are attended to by those after them, but not stored."""
    documents: list[tuple[int, int]]
    """Start and size of each document."""

    @classmethod
    def of(cls, documents: Sequence[Tensor], begins_with: Sequence[int | None], special: Sequence[int]) -> _Reading:
        tokens: list[Tensor] = []
        owns: list[Tensor] = []
        places: list[tuple[int, int]] = []
        for ids, first in zip(documents, begins_with):
            added = [] if first is None or int(ids[0]) in (first, *special) else [first]
            places.append((sum(len(part) for part in tokens), len(added) + len(ids)))
            tokens += [torch.tensor(added, dtype=torch.int64), ids]
            owns += [torch.zeros(len(added), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)]
        token_N, is_own_N = torch.cat(tokens), torch.cat(owns)
        kept_N = is_own_N & ~torch.isin(token_N, torch.tensor(special, dtype=torch.int64))
        return cls(token_N, is_own_N, kept_N, places)

    def places(self, reach: int) -> Tensor:
        """Positions of the tokens before the local text, none more than ``reach`` away, (N,).

        They begin at 1, where no first window has them: so a model whose keys do not move is noticed.
        """
        total = int(self.is_own_N.sum())
        own_N = self.is_own_N.cumsum(0) - 1
        return (own_N - total + min(total, reach)).clamp_(min=0) + 1


def _read(
    model: nn.Module,
    reading: _Reading,
    windows: Sequence[tuple[int, int, int]],
    recorder: _KeyValueRecorder,
    reach: int,
) -> None:
    device = next(model.parameters()).device
    place_N = reading.places(reach) if reach else torch.zeros_like(reading.token_N)
    longest = max(stop - start for start, stop, _ in windows)
    # Behind a short window come zeros, which nothing in it can see.
    ids_BT = torch.zeros(len(windows), longest, dtype=torch.int64)
    kept_BT = torch.zeros(len(windows), longest, dtype=torch.bool)
    place_BT = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, (start, stop, new) in enumerate(windows):
        ids_BT[row, : stop - start] = reading.token_N[start:stop]
        kept_BT[row, stop - start - new : stop - start] = reading.kept_N[stop - new : stop]
        place_BT[row, : stop - start] = place_N[start:stop]
    recorder.begin(kept_BT.to(device), place_BT.to(device))
    more = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids_BT.to(device), use_cache=False, **more)


class _TakenError(RuntimeError):
    """Carries the keys out of an attention module that is run for them alone."""

    def __init__(self, key_BGTD: Tensor) -> None:
        super().__init__()
        self.key_BGTD = key_BGTD


class _KeyValueRecorder:
    """Keeps keys and values of the new tokens of each window."""

    def __init__(self, sites: Sites, positions: str, store: LayerStore) -> None:
        self._sites, self._positions, self._store = sites, positions, store
        self._inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._elsewhere: list[tuple[Tensor, Any]] = []
        self._taking = self._busy = self._moved = False

    def begin(self, kept_BT: Tensor, place_BT: Tensor) -> None:
        """Before each batch of windows: which tokens are kept, and at which positions."""
        self.kept_BT, self.place_BT = kept_BT, place_BT
        self._elsewhere.clear()

    def layers(self) -> dict[int, LayerMemory]:
        """The recorded keys and values. Raises: ValueError when there are no positions to move, as was wanted."""
        if self._positions == "relative" and not (self._moved or self._sites.has_alibi):
            raise ValueError(
                "this model adds positions to its inputs, so memories have theirs for good; only "
                'positions="origin" fits it'
            )
        return self._store.layers()

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """While the block runs, inputs of attentions and position embeddings are noted."""
        hooks = [m.register_forward_pre_hook(self._note_inputs, with_kwargs=True) for m in self._sites.modules.values()]
        hooks += [m.register_forward_hook(self._note_rotary, with_kwargs=True) for m in rotary_modules(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_inputs(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._inputs[module] = (inputs, named)

    def _note_rotary(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: object) -> None:
        moved = with_positions(module, inputs, named, lambda _: self.place_BT)
        if moved is not None and isinstance(output, tuple):
            self._elsewhere.append((output[0], module.forward(*moved[0], **moved[1])))

    def wants(self, layer: int) -> bool:
        """All layers."""
        return True

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Keep this layer's keys and values; the output is the model's own."""
        if self._taking:
            raise _TakenError(call.key_BGLD)
        key_BGTD = call.key_BGLD if call.slope_H is not None else self._key_elsewhere(call)
        if not bool(torch.isfinite(key_BGTD).all()):
            raise ValueError(f"layer {call.layer} makes keys that are not finite numbers; memories need finite ones")
        for kind, x_BGTD in (("keys", key_BGTD), ("values", call.value_BGLD)):
            self._store.put(call.layer, kind, x_BGTD.transpose(1, 2)[self.kept_BT].transpose(0, 1))
        return call.plain()

    def _key_elsewhere(self, call: AttentionCall) -> Tensor:
        inputs, named = self._inputs[call.module]
        named = {name: None if name in _CACHES else self._moved_value(name, value) for name, value in named.items()}
        inputs = tuple(self._moved_value("", value) for value in inputs)
        self._taking = True
        try:
            call.module.forward(*inputs, **named)
        except _TakenError as taken:
            key_BGTD = taken.key_BGTD
        finally:
            self._taking = False
        self._moved = self._moved or (key_BGTD.shape[2] > 1 and not torch.equal(key_BGTD, call.key_BGLD))
        return key_BGTD

    def _moved_value(self, name: str, value: object) -> object:
        if name == "position_ids" and isinstance(value, Tensor):
            return self.place_BT
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            for original, moved in self._elsewhere:
                if value[0] is original:
                    return moved
        return value


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that make the position embeddings of rotary attention."""
    return [module for module in model.modules() if "Rotary" in type(module).__name__]


def with_positions(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A module's inputs with other ``position_ids``; None when it has none."""
    bound = inspect.signature(module.forward).bind(*inputs, **named)
    if not isinstance(bound.arguments.get("position_ids"), Tensor):
        return None
    bound.arguments["position_ids"] = change(bound.arguments["position_ids"])
    return bound.args, bound.kwargs
