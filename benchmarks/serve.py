"""A server with kNN-LM (520,000 keys): tokens/s of 8 streams are at least 3 times those of one, and a plain model's
completion takes at most 1.1 times as long as generate called directly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import common
import hf_inputs

sys.path.insert(0, str(common.ROOT))

_PROMPT, _NEW, _STREAMS = 32, 128, 8


@contextlib.contextmanager
def running_server(model: Any, store: str) -> Iterator[str]:
    """The address of a server in a thread of this process, so that both sides have the same model."""
    from fairseq.serving.config import ModelServerConfig
    from fairseq.serving.opening import open_server
    from fairseq.web.running import Address, run

    config = ModelServerConfig(model="benchmark", store=(f"store={store}",), port=0, grace_seconds=1)
    with Address(config) as address, open_server(config, model) as server:
        ready = threading.Event()
        serving = threading.Thread(target=run, args=(server.app(), address), kwargs={"ready": ready.set}, daemon=True)
        serving.start()
        ready.wait()
        yield address.url


async def ask(client: Any, prompt: list[int], more: dict[str, Any]) -> None:
    """Read a completion, as it comes or whole."""
    body = {"prompt": prompt, "max_tokens": _NEW, "temperature": 0, "return_token_ids": True} | more
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            text = line.removeprefix("data: ")
            if text.startswith("{"):
                count += sum(len(choice.get("token_ids", ())) for choice in json.loads(text)["choices"])
    assert count == _NEW, count


def seconds_of(url: str, prompts: list[list[int]], more: dict[str, Any]) -> float:
    """Seconds of some requests at once."""
    import httpx

    async def all_at_once() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            began = time.perf_counter()
            await asyncio.gather(*(ask(client, prompt, more) for prompt in prompts))
            return time.perf_counter() - began

    return asyncio.run(all_at_once())


def answer_orders(pipe: Any) -> None:
    """The client's process: a client in the server's would take the interpreter from it."""
    while (order := pipe.recv()) is not None:
        pipe.send(seconds_of(*order))


@contextlib.contextmanager
def client_process() -> Iterator[Any]:
    """Calls ``seconds_of`` in another process."""
    context = multiprocessing.get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=answer_orders, args=(its,), daemon=True)
    process.start()

    def call(url: str, prompts: list[list[int]], **more: Any) -> float:
        pipe.send((url, prompts, more))
        return float(pipe.recv())

    try:
        yield call
    finally:
        pipe.send(None)
        process.join(10)


def main() -> None:
    """Measure both ratios, each pair in turn; requests are timed by the client."""
    options = hf_inputs.parser(common.parser(__doc__)).parse_args()
    import torch

    inputs = hf_inputs.load(options)
    model, ids = inputs.model, inputs.ids
    model.generation_config.eos_token_id = None
    prompts = [ids[_PROMPT * n : _PROMPT * (n + 1)] for n in range(_STREAMS)]
    settings = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}

    def generate() -> float:
        prompt = torch.tensor(prompts[:1])
        began = time.perf_counter()
        assert model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).shape[1] == _PROMPT + _NEW
        return time.perf_counter() - began

    found: dict[str, list[float]] = {}

    def measure(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    with running_server(model, inputs.store) as url, client_process() as client:
        for _ in range(options.repeats + 1):
            measure("one_stream_knn", client(url, prompts[:1], stream=True))
            measure("eight_streams_knn", client(url, prompts, stream=True))
            measure("generate_plain", generate())
            measure("whole_plain", client(url, prompts[:1], knn=False))
            measure("one_stream_plain", client(url, prompts[:1], knn=False, stream=True))
    seconds = {name: values[1:] for name, values in found.items()}  # without the first turn
    ratio = _STREAMS * common.median_ratio(seconds["one_stream_knn"], seconds["eight_streams_knn"])
    overhead = common.median_ratio(seconds["whole_plain"], seconds["generate_plain"])
    streaming = common.median_ratio(seconds["one_stream_plain"], seconds["generate_plain"])
    details = {
        "model": inputs.name,
        "tokens": _NEW,
        "plain_over_generate": overhead,
        "plain_stream_over_generate": streaming,
    }
    common.tell(
        "serve", "8 streams over one with kNN-LM, tokens/s", ratio, ">= 3", details | {"seconds": seconds}, options.out
    )
    sys.stdout.write(
        f"serve: plain model, server over generate, seconds: {overhead:.3f} (wanted: <= 1.1), as a stream "
        f"{streaming:.3f}\n"
    )


if __name__ == "__main__":
    main()
