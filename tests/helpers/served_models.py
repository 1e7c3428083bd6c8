"""A server of a tiny model in a thread of the test's process, and what it must answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

WORDS = ["<pad>", "<s>", "</s>"] + [f"w{number}" for number in range(3, tiny_models.VOCABULARY)]
TEMPLATE = "{% for message in messages %}{{ message['role'][0] }} {{ message['content'] }} {% endfor %}w3"


def tokenizer(template: str | None = None) -> Any:
    """A tokenizer whose words are w3 to w47, and the first letters of roles unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w47"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w47"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **ends)


def words_of(ids: Any) -> str:
    """The text of some tokens."""
    return " ".join(WORDS[int(number)] for number in ids)


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens."""
    return tiny_models.tokens(length, seed=seed).tolist()


def endless(model: Any) -> Any:
    """The model, whose generations are as long as they are asked to be."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def continuation(model: Any, ids: list[int], count: int, seed: int | None = None, **settings: Any) -> list[int]:
    """What ``generate`` continues a prompt with: greedy, or sampled with a seed."""
    settings = {"do_sample": seed is not None, "max_new_tokens": count} | settings
    if seed is not None:
        settings = {"top_k": 0} | settings
        torch.manual_seed(seed)
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        return model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **settings)[0, len(ids) :].tolist()


class Served:
    """A running server, and a client of it."""

    def __init__(self, server: Any, address: Any, running: Any) -> None:
        self.server, self.address, self._running = server, address, running
        self.client = httpx.Client(base_url=address.url, trust_env=False, timeout=60)

    def stop(self) -> None:
        """Ask the server to stop."""
        self._running.should_exit = True

    def post(self, path: str, expect: int = 200, **body: Any) -> dict[str, Any]:
        """The JSON answer to a JSON request."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == expect, answer.text
        return answer.json()

    def complete(self, ids: Any, expect: int = 200, **body: Any) -> dict[str, Any]:
        """A greedy completion with its token ids, unless the body says otherwise."""
        body = {"prompt": ids, "temperature": 0, "return_token_ids": True} | body
        return self.post("/v1/completions", expect, **body)

    def tokens(self, ids: Any, **body: Any) -> list[int]:
        """The tokens of the first choice."""
        return self.complete(ids, **body)["choices"][0]["token_ids"]

    def figure(self, name: str) -> float:
        """One of the figures."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any = None, **options: Any) -> Iterator[Served]:
    """While the block runs, the model is served with some options of ``ModelServerConfig``."""
    from fairseq.serving.app import OPEN_PATHS
    from fairseq.serving.config import ModelServerConfig
    from fairseq.serving.opening import open_server
    from fairseq.web.running import Address, make_server

    config = ModelServerConfig(**{"model": "tiny", "port": 0, "grace_seconds": 5} | options)
    with Address(config) as address, open_server(config, model, tokenizer) as server:
        running = make_server(server.app(), address, open_paths=OPEN_PATHS, grace_seconds=config.grace_seconds)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [address.socket]}, daemon=True)
        thread.start()
        served = Served(server, address, running)
        try:
            yield served
        finally:
            served.client.close()
            served.stop()
            thread.join(20)
            assert not thread.is_alive()
