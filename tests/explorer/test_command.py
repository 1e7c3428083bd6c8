"""fairseq-explore as a program: it listens, answers while it scores, and ends when it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import httpx
import pytest

from fairseq.explorer.explanation import Explanation
from fairseq.explorer.live import Opened
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.text_table import TableWriter
from fairseq.explorer.words import NumberWords
from fairseq_cli.web import explore


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_it_listens_until_it_is_interrupted(kept, free_port, capsys):
    answers = []

    def visit():
        deadline = time.monotonic() + 20
        with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False) as client:
            while time.monotonic() < deadline and not answers:
                try:
                    answers.append(client.get("/api/about").json())
                except httpx.ConnectError:
                    time.sleep(0.05)
            answers.append(client.get("/", headers={"host": "evil.example"}).status_code)
            answers.append(client.get("/", headers={"origin": "http://evil.example"}).status_code)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    explore.main([str(kept.path), "--port", str(free_port)])
    visitor.join(10)
    about, *statuses = answers
    assert about["num_tokens"] == len(kept.logp)
    assert statuses == [421, 403]
    assert capsys.readouterr().out == f"listening on http://127.0.0.1:{free_port}/\n"


def opened(work):
    writer = TableWriter(4)
    writer.write([0, 1, 2, 3], token=5, counted=True, norm=0.0)
    explanation = Explanation("knn", "t", writer.table, NeighborTexts(NumberWords()))

    def fill(check):
        work(writer, check)

    return Opened(explanation, fill)


def test_what_is_scored_is_shown_before_the_rest():
    half, go = threading.Event(), threading.Event()

    def work(writer, check):
        writer.write([0, 1], lm=[-1.0, -2.0])
        half.set()
        go.wait(10)
        writer.write([2, 3], lm=[-3.0, -4.0])

    with opened(work) as shown:
        assert half.wait(10)
        about = shown.explanation.about()
        assert (about["num_ready"], about["num_tokens"], about["working"]) == (2, 4, True)
        with pytest.raises(ValueError, match="token 2 is not scored yet"):
            shown.explanation.details(2)
        go.set()
        shown.finish()
        assert shown.explanation.about()["num_ready"] == 4


def test_scoring_ends_with_the_program_and_its_failure_is_shown():
    ended = threading.Event()

    def endless(writer, check):
        try:
            while True:
                check()
        finally:
            ended.set()

    with opened(endless):
        pass
    assert ended.is_set()

    def fails(writer, check):
        raise ValueError("the disk is full")

    with opened(fails) as shown:
        with pytest.raises(ValueError, match="the disk is full"):
            shown.finish()
        about = shown.explanation.about()
        assert about["failed"]
        assert about["notes"] == ["Scoring stopped: the disk is full"]
