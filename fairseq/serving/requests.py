"""Bodies of requests as the engine takes them: OpenAI's fields, and those for memories.

OpenAI's reference: https://platform.openai.com/docs/api-reference/completions and .../chat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.hf.attention.wrapper import PER_CALL
from fairseq.hf.decoding.mixing import KnnSettings
from fairseq.hf.decoding.sampling import SamplingSettings
from fairseq.serving.errors import ApiError
from fairseq.serving.fields import Body, token_ids
from fairseq.serving.jobs import Generation
from fairseq.serving.texts import Codec

_LARGEST_SEED = 2**63 - 1
_CONTEXT_TOKENS = 64
_LOWEST_TEMPERATURE = 1e-4
_LARGEST_KEY = 1e15
"""Of the numbers of a key: the square of a longer distance overflows float32."""


@dataclass(frozen=True)
class StoreFacts:
    """A store as a request sees it."""

    default_k: int
    num_alive: int


@dataclass(frozen=True)
class RequestRules:
    """What requests may ask for, and what holds where they say nothing."""

    model: str
    """Name of the model."""
    codec: Codec
    vocabulary: int
    max_length: int
    """Tokens of a prompt and its continuation."""
    max_choices: int
    max_prompts: int
    stores: Mapping[str, Callable[[], StoreFacts]]
    """By name; the first is used where a request names none."""
    weight: float = 0.25
    """Share of the neighbours where a request states none."""
    temperature: float = 1.0
    """Of the neighbours, where a request states none."""
    has_mind: bool = False
    """The model has memories inside attention."""
    max_k: int = 4096
    max_stops: int = 16
    max_top: int = 20
    max_neighbors: int = 100
    max_characters: int = 1 << 20
    """Of a text."""

    @property
    def default_store(self) -> str | None:
        """The store of a request that names none."""
        return next(iter(self.stores), None)


@dataclass(frozen=True)
class Asked:
    """A request, read: a generation for each prompt, and how to answer."""

    generations: tuple[Generation, ...]
    streams: bool
    with_usage: bool
    """A stream ends with the numbers of tokens."""
    with_ids: bool
    """Choices have their tokens' ids."""
    is_chat: bool


def read_completion(body: Body, rules: RequestRules) -> Asked:
    """The body of ``/v1/completions``. Raises: ApiError."""
    prompts = _prompts(body, rules)
    top = body.whole("logprobs", None, low=0, high=rules.max_top)
    echo = body.flag("echo")
    stated = body.whole("max_tokens", 16, low=0 if echo else 1, high=rules.max_length)
    assert stated is not None
    body.only("suffix", "")
    body.only("best_of", 1)
    shared = _shared(body, rules)
    generations = []
    for prompt in prompts:
        _check_length(len(prompt), stated, rules)
        generations.append(Generation(prompt, stated, num_top=top, echo=echo, **shared.generation))
    return shared.asked(body, tuple(generations), is_chat=False)


def read_chat(body: Body, rules: RequestRules) -> Asked:
    """The body of ``/v1/chat/completions``. Raises: ApiError."""
    prompt = _chat_prompt(body, rules)
    top = body.whole("top_logprobs", 0, low=0, high=rules.max_top)
    wants_logp = body.flag("logprobs")
    if top and not wants_logp:
        body.fail("top_logprobs", "needs logprobs: true")
    if body.has("max_tokens") and body.has("max_completion_tokens"):
        body.fail("max_tokens", "and max_completion_tokens mean the same; give one")
    name = "max_tokens" if body.has("max_tokens") else "max_completion_tokens"
    room = max(1, rules.max_length - len(prompt))
    stated = body.whole(name, room, low=1, high=rules.max_length)
    body.ignore("max_tokens", "max_completion_tokens")
    assert stated is not None
    _check_length(len(prompt), stated, rules)
    for field in ("tools", "functions", "tool_choice", "function_call", "audio"):
        body.only(field, [], "none")
    body.only("response_format", {"type": "text"})
    body.only("modalities", ["text"])
    body.only("parallel_tool_calls", True, False)
    body.ignore("service_tier", "safety_identifier", "prompt_cache_key")
    shared = _shared(body, rules)
    generation = Generation(prompt, stated, num_top=top if wants_logp else None, **shared.generation)
    return shared.asked(body, (generation,), is_chat=True)


@dataclass(frozen=True)
class _Shared:
    generation: dict[str, Any]
    streams: bool
    with_usage: bool
    with_ids: bool

    def asked(self, body: Body, generations: tuple[Generation, ...], *, is_chat: bool) -> Asked:
        body.end()
        return Asked(generations, self.streams, self.with_usage, self.with_ids, is_chat)


def _shared(body: Body, rules: RequestRules) -> _Shared:
    """The fields that both forms have."""
    check_model(body.text("model", longest=1000), rules.model)
    sampling = SamplingSettings(
        temperature=_temperature(body),
        top_p=body.number("top_p", 1.0, low=0.0, high=1.0, above=True),
        seed=body.whole("seed", None, low=-_LARGEST_SEED, high=_LARGEST_SEED),
    )
    choices = body.whole("n", 1, low=1, high=rules.max_choices)
    store, knn = _knn(body, rules)
    neighbors = body.whole("neighbors", 0, low=0, high=rules.max_neighbors)
    if neighbors and knn is None:
        body.fail("neighbors", "needs a store: none is served, or knn is false")
    streams = body.flag("stream")
    options = body.object("stream_options")
    if options is not None and not streams:
        body.fail("stream_options", "needs stream: true")
    with_usage = options is not None and options.flag("include_usage")
    if options is not None:
        options.ignore("include_obfuscation")
        options.end()
    for name in ("presence_penalty", "frequency_penalty"):
        body.only(name, 0, 0.0)
    body.only("logit_bias", {})
    body.only("store", False)
    body.ignore("user", "metadata")
    generation = {
        "sampling": sampling,
        "num_choices": choices,
        "stops": _stops(body, rules),
        "store": store,
        "knn": knn,
        "mind": _mind(body, rules),
        "num_neighbors": neighbors,
    }
    return _Shared(generation, streams, with_usage, body.flag("return_token_ids"))


def _temperature(body: Body) -> float:
    """0, or a number by which log-probabilities can be divided without an overflow."""
    value = body.number("temperature", 1.0, low=0.0, high=2.0)
    if 0.0 < value < _LOWEST_TEMPERATURE:
        body.fail("temperature", f"must be 0 or at least {_LOWEST_TEMPERATURE}, got {value}")
    return value


def check_model(given: str | None, served: str) -> None:
    """Raise ApiError for the name of another model."""
    if given is not None and given != served:
        raise ApiError(
            404, f"the model {given!r} is not served here; {served!r} is", param="model", code="model_not_found"
        )


def store_named(name: str | None, rules: RequestRules, param: str) -> str:
    """The store of a name; the default one for None. Raises: ApiError where there is none."""
    chosen = rules.default_store if name is None else name
    if chosen is None or chosen not in rules.stores:
        known = ", ".join(rules.stores) or "none"
        what = "no store is served" if chosen is None else f"there is no store {chosen!r}; the stores: {known}"
        raise ApiError(404, what, param=param, code="store_not_found")
    return chosen


def _knn(body: Body, rules: RequestRules) -> tuple[str | None, KnnSettings | None]:
    """Store and settings of a request; None for the model alone."""
    if body.is_false("knn"):
        body.take("knn")
        return None, None
    given = body.object("knn")
    if given is None:
        if rules.default_store is None:
            return None, None
        given = Body({}, "knn.")
    name = store_named(given.text("store", longest=1000), rules, "knn.store")
    facts = rules.stores[name]()
    settings = KnnSettings(
        weight=given.number("lambda", rules.weight, low=0.0, high=1.0),
        k=given.whole("k", facts.default_k, low=1, high=min(rules.max_k, facts.num_alive)) or 1,
        temperature=given.number("temperature", rules.temperature, low=_LOWEST_TEMPERATURE, high=1e9),
    )
    given.end()
    return name, settings


def _mind(body: Body, rules: RequestRules) -> tuple[tuple[str, Any], ...]:
    if body.is_false("extended_mind"):
        body.take("extended_mind")
        return (("use_external_mind", False),) if rules.has_mind else ()
    given = body.object("extended_mind")
    if given is None:
        return ()
    if not rules.has_mind:
        body.fail("extended_mind", "needs memories inside attention; start the server with --extended-mind")
    found: dict[str, Any] = {}
    for name in PER_CALL:
        if not given.has(name):
            given.take(name)
        elif name == "topk":
            found[name] = given.whole(name, None, low=0, high=rules.max_k)
        elif name == "sim_threshold":
            found[name] = given.number(name, 0.0, low=-1.0, high=1.0)
        else:
            found[name] = given.flag(name)
    given.end()
    return tuple(sorted(found.items()))


def _stops(body: Body, rules: RequestRules) -> tuple[str, ...]:
    if not body.has("stop"):
        body.take("stop")
        return ()
    value = body.take("stop")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
        body.fail("stop", "must be a text or a list of texts, none of them empty")
    if len(values) > rules.max_stops or any(len(each) > 1000 for each in values):
        body.fail("stop", f"may have at most {rules.max_stops} texts of at most 1000 characters")
    if values and rules.codec.tokenizer is None:
        body.fail("stop", "needs a tokenizer, and the model has none")
    return tuple(values)


def _prompts(body: Body, rules: RequestRules) -> list[tuple[int, ...]]:
    value = body.take("prompt")
    if value is None:
        body.fail("prompt", "is missing")
    many = isinstance(value, list) and value and isinstance(value[0], (str, list))
    values = value if many else [value]
    if len(values) > rules.max_prompts:
        body.fail("prompt", f"may hold at most {rules.max_prompts} prompts, got {len(values)}")
    return [tuple(read_text(each, "prompt", rules)) for each in values]


def read_text(value: Any, name: str, rules: RequestRules) -> list[int]:
    """Tokens of a text, or of a list of token ids. Raises: ApiError for anything else, and where there are none."""
    if isinstance(value, list):
        ids = token_ids(value, name, rules.vocabulary)
    elif not isinstance(value, str):
        raise ApiError(400, f"{name} must be a text or a list of token ids", param=name, code="invalid_value")
    elif rules.codec.tokenizer is None:
        raise ApiError(400, f"the model has no tokenizer; give {name} as a list of token ids", param=name)
    elif len(value) > rules.max_characters:
        raise ApiError(400, f"{name} may have at most {rules.max_characters} characters, got {len(value)}", param=name)
    else:
        ids = rules.codec.encode(value)
    if not ids:
        raise ApiError(400, f"{name} holds no tokens", param=name, code="invalid_value")
    return ids


def _chat_prompt(body: Body, rules: RequestRules) -> tuple[int, ...]:
    messages = body.items("messages", most=4096)
    if messages is None:
        body.fail("messages", "is missing")
    if not rules.codec.has_template:
        raise ApiError(
            400, "the tokenizer of this model has no chat template; use /v1/completions", code="no_chat_template"
        )
    plain = [_message(each, number) for number, each in enumerate(messages)]
    try:
        text = rules.codec.render(plain)
    except Exception as error:  # a template may reject roles or their order with an error of its own
        raise ApiError(400, f"the chat template rejects the messages: {error}", param="messages") from error
    if len(text) > rules.max_characters:
        raise ApiError(400, f"messages may have at most {rules.max_characters} characters in all", param="messages")
    return tuple(rules.codec.encode(text, special=False))


def _message(value: Any, number: int) -> dict[str, str]:
    path = f"messages[{number}]"
    if not isinstance(value, dict):
        raise ApiError(400, f"{path} must be an object with role and content", param=path, code="invalid_value")
    body = Body(value, f"{path}.")
    role = body.text("role", longest=100)
    content = body.take("content")
    body.ignore("name")
    # An answer's message may be sent back as it came, with all its fields.
    for field in ("refusal", "audio", "function_call"):
        body.only(field)
    for field in ("annotations", "tool_calls"):
        body.only(field, [])
    body.end()
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if role is None or not isinstance(content, str):
        raise ApiError(400, f"{path} must have a role and a content of text", param=path, code="invalid_value")
    return {"role": role, "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_length(num_prompt: int, max_tokens: int, rules: RequestRules) -> None:
    if num_prompt + max_tokens > rules.max_length:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together more than the "
            f"{rules.max_length} that the model reads; shorten either",
            param="max_tokens" if num_prompt < rules.max_length else "prompt",
            code="context_length_exceeded",
        )


@dataclass(frozen=True)
class SearchRequest:
    """The body of ``/search``."""

    store: str
    k: int
    context: int
    """Tokens shown on either side of a neighbour."""
    tokens: tuple[int, ...] = ()
    """A text whose last position is looked up."""
    keys: tuple[tuple[float, ...], ...] = ()
    """Keys that are looked up as they are."""


def read_search(body: Body, rules: RequestRules) -> SearchRequest:
    """The body of ``/search``: one of text, tokens or keys. Raises: ApiError."""
    store = store_named(body.text("store", longest=1000), rules, "store")
    facts = rules.stores[store]()
    k = body.whole("k", min(10, facts.num_alive), low=1, high=min(rules.max_k, facts.num_alive))
    context = body.whole("context", 16, low=0, high=_CONTEXT_TOKENS)
    given = {name: body.take(name) for name in ("text", "tokens", "keys")}
    body.end()
    stated = [name for name, value in given.items() if value is not None]
    if len(stated) != 1:
        raise ApiError(400, f"give one of text, tokens and keys, got {' and '.join(stated) or 'none'}", param="text")
    assert k is not None
    assert context is not None
    if given["keys"] is not None:
        return SearchRequest(store, k, context, keys=_keys(given["keys"], rules.max_prompts))
    ids = read_text(given[stated[0]], stated[0], rules)
    if len(ids) > rules.max_length:
        raise ApiError(400, f"{stated[0]} has {len(ids)} tokens, more than {rules.max_length}", param=stated[0])
    return SearchRequest(store, k, context, tokens=tuple(ids))


def _keys(value: Any, most: int) -> tuple[tuple[float, ...], ...]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    is_numbers = all(isinstance(row, list) and row and all(map(_is_key_number, row)) for row in rows)
    if not is_numbers or len({len(row) for row in rows}) != 1:
        raise ApiError(
            400, f"keys must be a list of numbers up to {_LARGEST_KEY:g}, or several of one length", param="keys"
        )
    if len(rows) > most:
        raise ApiError(400, f"keys may hold at most {most} keys, got {len(rows)}", param="keys")
    return tuple(tuple(map(float, row)) for row in rows)


def _is_key_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_KEY
