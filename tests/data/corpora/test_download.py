"""Downloads against a small server on this machine that can break off, ignore ranges and serve wrong bytes."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fairseq.data.corpora import download

CONTENT = bytes(range(256)) * 64
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name; records the ranges that were asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.break_off_after: list[int] = []  # one number of bytes per answer that is cut short
        self.knows_ranges = True

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.knows_ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = self.server.break_off_after.pop(0) if self.server.break_off_after else len(body)
        self.wfile.write(body[:sent])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_file_arrives_whole_and_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    path = download.fetch("a.zip", [server.base + "/"], tmp_path, DIGEST)
    assert path == tmp_path / "a.zip"
    assert path.read_bytes() == CONTENT
    download.fetch("a.zip", [server.base], tmp_path, DIGEST)
    assert server.ranges == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_partial_file_is_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:1000])
    assert download.fetch("a.zip", [server.base], tmp_path, DIGEST).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_partial_file_needs_nothing_more(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    assert download.fetch("a.zip", [server.base], tmp_path, DIGEST).read_bytes() == CONTENT


def test_a_broken_connection_is_continued_in_the_same_call(server: Server, tmp_path: Path) -> None:
    server.break_off_after = [100, 200]
    assert download.fetch("a.zip", [server.base], tmp_path, DIGEST).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100-", "bytes=300-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    (tmp_path / "a.zip.part").write_bytes(b"old" * 100)
    assert download.fetch("a.zip", [server.base], tmp_path, DIGEST).read_bytes() == CONTENT


def test_the_next_address_is_tried(server: Server, tmp_path: Path) -> None:
    assert download.fetch("a.zip", [closed_port(), server.base], tmp_path, DIGEST).read_bytes() == CONTENT


def test_wrong_bytes_are_rejected_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{DIGEST}, expected {'0' * 64}"):
        download.fetch("a.zip", [server.base], tmp_path, "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_put_there_by_hand_is_rejected_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"mine")
    with pytest.raises(ValueError, match="remove it"):
        download.fetch("a.zip", [closed_port()], tmp_path, DIGEST)
    assert (tmp_path / "a.zip").read_bytes() == b"mine"


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"cannot download a\.zip: .*refused.*DATA_MIRROR"):
        download.fetch("a.zip", [closed_port()], tmp_path, DIGEST)


def test_without_a_known_digest_the_first_one_is_kept_and_compared_with(server: Server, tmp_path: Path) -> None:
    path = download.fetch("thing.zip", [server.base], tmp_path, None)
    assert (tmp_path / "thing.zip.sha256").read_text().strip() == DIGEST
    assert download.fetch("thing.zip", [], tmp_path, None) == path
    path.write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match=f"expected {DIGEST}"):
        download.fetch("thing.zip", [server.base], tmp_path, None)
