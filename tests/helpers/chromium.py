"""Chromium for tests of pages, and a server on a thread."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fairseq.web.access import Guard
from fairseq.web.config import AddressConfig
from fairseq.web.running import Address

WORDS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def find_chromium() -> str | None:
    """Debian's Chromium, or the one that CHROMIUM names."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test where playwright or Chromium is missing, unless PAGE_TESTS=always."""
    path = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sync_playwright = None
    if path is None or sync_playwright is None:
        missing = "Chromium (apt-get install chromium)" if path is None else "playwright (pip install '.[page]')"
        if os.environ.get("PAGE_TESTS") == "always":
            pytest.fail(f"{missing} is missing")
        pytest.skip(f"{missing} is missing")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=WORDS)
        yield browser
        browser.close()


@contextlib.contextmanager
def serving(app: Any, token: str | None = None) -> Iterator[str]:
    """The address of an application that is answered by a thread, to those who know the token if there is one."""
    import uvicorn

    with Address(AddressConfig(port=0, token=token)) as address:
        server = uvicorn.Server(uvicorn.Config(Guard(app, address.access()), log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address.socket]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield address.url
        server.should_exit = True
        thread.join(10)
