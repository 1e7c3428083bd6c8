"""Threads of a caller in inference mode."""

import torch

from fairseq.runtime.threads import run_in_threads


def test_threads_write_what_a_caller_in_inference_mode_made():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            made = torch.zeros(4)
            run_in_threads(lambda place: made[place].add_(place), range(4))
        assert made.tolist() == [0, 1, 2, 3]
    finally:
        torch.set_num_threads(before)
