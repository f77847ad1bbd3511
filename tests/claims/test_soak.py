"""After many runs a process holds what it held after a few; a leak would be seen."""

import pytest
import torch

from tests.benchmarks.soak import RESID, held, soak
from tests.helpers import small
from tests.helpers.passes import boot


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("m"), hidden_dim=8)
    return boot(folder, torch.device("cpu"))


def test_after_many_runs_as_much_is_held_as_after_a_few(bridge):
    first, last = soak(bridge, runs=40)
    assert last.tensors == first.tensors and last.files == first.files
    assert first.hooks == last.hooks == 0
    assert last.resident - first.resident < 24, "MiB"


def test_a_leak_is_seen(bridge):
    first = held(bridge)
    kept = torch.ones(2)
    handle = bridge.hook_dict[RESID].add_hook(lambda x, hook: None)
    last = held(bridge)
    assert last.tensors > first.tensors and last.hooks == 1 and len(kept) == 2
    handle.hook.remove()
    bridge.hook_dict[RESID].fwd_hooks.clear()
