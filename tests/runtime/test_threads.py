"""Pooled objects are never shared by two tasks, and are created no more often than needed."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import torch

from fairseq.runtime.threads import ObjectPool, openmp_team, run_in_threads


def test_no_two_tasks_have_the_same_thing(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    numbers = itertools.count()
    spare, taken, lock, most = ObjectPool(lambda: next(numbers)), set(), threading.Lock(), [0]

    def task(_):
        with spare.borrow() as number:
            with lock:
                assert number not in taken
                taken.add(number)
                most[0] = max(most[0], len(taken))
            time.sleep(1e-4)
            with lock:
                taken.remove(number)

    run_in_threads(task, range(400))
    assert 1 <= next(numbers) <= 8
    assert most[0] <= 8
    assert not taken


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_forked_process_has_no_team():
    child = os.fork()
    if not child:
        os._exit(openmp_team()[1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
