"""How many threads torch has within a task."""

import torch

from fairseq.runtime.threads import map_in_threads


def _sees(task):
    torch.ones(1 << 17).exp_()  # a parallel loop, at which torch reads its setting for the first time
    return torch.get_num_threads()


def test_torch_computes_on_one_thread_within_a_task_and_on_as_many_as_before_outside():
    before = torch.get_num_threads()
    try:
        for count in (2, 3, 2):  # threads of the first pool are there again
            torch.set_num_threads(count)
            assert list(map_in_threads(_sees, range(8))) == [1] * 8
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
