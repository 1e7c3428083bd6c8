import os
import signal
import socket
import threading
import time

import httpx
import pytest

from fairseq.web.config import AddressConfig
from fairseq.web.running import Address, run

ASKED = threading.Event()
"""A request has arrived."""


async def app(scope, receive, send):
    """Answers after a moment, long enough to be stopped meanwhile."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    import asyncio

    ASKED.set()
    await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_port_in_use_is_found_when_the_address_is_made():
    with Address(AddressConfig(port=0)) as first, pytest.raises(ValueError, match=rf"--port {first.port} .* in use"):
        Address(AddressConfig(port=first.port))


def test_loopback_needs_no_token_and_has_three_names():
    with Address(AddressConfig(port=0)) as address:
        assert address.token is None
        assert address.access().names == {"localhost", "127.0.0.1", "::1"}
        assert address.url == f"http://127.0.0.1:{address.port}/"


def test_other_addresses_get_a_token(monkeypatch):
    monkeypatch.delenv("FAIRSEQ_TOKEN", raising=False)
    with Address(AddressConfig(host="0.0.0.0", port=0)) as address:
        assert len(address.token) >= 24
        assert address.url.endswith(f"?token={address.token}")
        assert address.access().names is None
    monkeypatch.setenv("FAIRSEQ_TOKEN", "from-outside")
    with Address(AddressConfig(host="0.0.0.0", port=0)) as address:
        assert address.token == "from-outside"


def test_a_host_that_is_not_ours_is_one_line():
    with pytest.raises(ValueError, match="--host host.invalid"):
        Address(AddressConfig(host="host.invalid", port=0))


@pytest.mark.parametrize("fields", [{"port": 70000}, {"port": -1}, {"token": ""}, {"token": "a\nb"}])
def test_impossible_values_are_rejected(fields):
    with pytest.raises(ValueError, match="--port|--token"):
        AddressConfig(**fields)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_in_progress_are_answered_before_the_stop(capsys, number):
    """The program is stopped by a signal while it answers; the answer still comes."""
    answers = []
    ASKED.clear()

    def ask(address):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", address.port)) == 0:
                    break
        with httpx.Client(base_url=address.url, trust_env=False) as client:
            # Not before: the address is bound from the start, and until the server runs a signal is this program's own.
            threading.Thread(target=lambda: ASKED.wait(10) and os.kill(os.getpid(), number)).start()
            answers.append(client.get("/page").text)

    with Address(AddressConfig(port=0)) as address:
        client = threading.Thread(target=ask, args=(address,))
        client.start()
        run(app, address)
        client.join(10)
    assert answers == ["/page"]
    assert capsys.readouterr().out == f"listening on {address.url}\n"
