"""What a CUDA graph captures, and everything around the capture, without a GPU.

The captured function runs here as it is, and has the numbers of the other path. It is safe to
capture if it launches kernels alone: nothing asks for a value or copies between devices, and no
shape depends on a number.
"""

from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import CachedPasses, boot
from transformer_lens_bd3lm.bridge import cuda_graphs
from transformer_lens_bd3lm.bridge.cuda_graphs import (
    Graphs,
    is_capturable,
    of_fixed_shape,
    through_blocks,
)
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.errors import InputError

EXACT = 1e-12
aten = torch.ops.aten


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("graphs")
    changes = {"adaln": {}, "no adaln": {"adaln": False}}
    return {name: small.save(root / name, **how) for name, how in changes.items()}


class Uncaptured:
    """In place of the graphs of a scope: what they would capture, run at each pass."""

    def __init__(self):
        self.seen, self.shapes, self.passes = WeakSet(), set(), 0

    def replay(self, model, x, c, routing):
        if not is_capturable(model, x, c, routing):
            return None
        if routing.cache not in self.seen:
            self.seen.add(routing.cache)
            routing.cache.clear_unstored()
        fixed = of_fixed_shape(routing)
        self.passes += 1
        self.shapes.add((x.shape, fixed.cache.keys))
        return through_blocks(model, x, c, fixed)


@pytest.fixture
def poisoned():
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize(
    ("name", "size", "batch", "new"),
    [("adaln", 4, 1, 9), ("adaln", 8, 3, 24), ("no adaln", 1, 3, 9), ("processed", 4, 3, 9)],
)
def test_runs_write_the_same(
    folders, device, poisoned, monkeypatch, name, size, batch, new, lookahead
):
    monkeypatch.setattr(cuda_graphs, "SPAN", 16)
    bridge = boot(folders.get(name, folders["adaln"]), device, torch.float64)
    if name == "processed":
        bridge.enable_compatibility_mode()
    how = {"max_new_tokens": new, "block_size": size, "lookahead": lookahead}
    wanted = bd3lm.denoise(bridge, small.prompt_of(batch, 3), **how)
    graphs = bridge.original_model.graphs = Uncaptured()
    found = bd3lm.denoise(bridge, small.prompt_of(batch, 3), **how)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_p, wanted.log_p, rtol=0, atol=EXACT, equal_nan=True)
    assert graphs.passes == found.passes >= len(graphs.shapes)


def test_unwritten_memory_would_be_seen(folders, device, poisoned, monkeypatch):
    monkeypatch.setattr(KVCache, "clear_unstored", lambda self: None)
    bridge = boot(folders["adaln"], device, torch.float64)
    bridge.original_model.graphs = Uncaptured()
    with pytest.raises(InputError, match="NaN"):
        bd3lm.denoise(bridge, small.prompt_of(1, 3), max_new_tokens=4)


class KernelsAlone(TorchDispatchMode):
    """Operations of a function that may be captured: on one device, with shapes known before."""

    FORBIDDEN = (
        aten._local_scalar_dense.default,
        aten.lift_fresh.default,
        aten.nonzero.default,
        aten.masked_select.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.FORBIDDEN, func
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                assert x.device.type == "meta", f"{func} met a tensor on {x.device}"
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func
        return out


class NoLists(TorchFunctionMode):
    """A tensor made of a list is copied to the device, and the copy waits; "meta" does not show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adaln", "no adaln", "processed"])
def test_what_is_captured_launches_kernels_alone(folders, name):
    bridge = boot(folders.get(name, folders["adaln"]), torch.device("cpu"))
    if name == "processed":
        bridge.enable_compatibility_mode()
    model = bridge.original_model.to("meta")
    outputs = []

    class Meta(Uncaptured):
        def replay(self, model, x, c, routing):
            routing.constants = {}
            assert is_capturable(model, x, c, routing)
            with KernelsAlone(), NoLists():
                fixed = of_fixed_shape(routing)
                outputs.append(through_blocks(model, x, c, fixed))
            return outputs[-1]

    passes = CachedPasses(bridge, 3, 16, 4)
    passes.cache.commit(4)
    model.graphs = Meta()
    passes(torch.zeros(3, 8, dtype=torch.long, device="meta"), 12)
    assert [x.shape for x in outputs] == [(3, 8, 16)]


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda x: bool(x.sum()),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(1),
        lambda x: x * torch.tensor([2.0], device=x.device),
    ],
)
def test_what_is_unsafe_would_be_seen(unsafe):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        with KernelsAlone(), NoLists():
            unsafe(torch.zeros(2, device="meta"))


@torch.no_grad()
def test_passes_that_are_not_captured(folders, device):
    bridge = boot(folders["adaln"], device)
    model = bridge.original_model
    asked = []

    class Asked(Uncaptured):
        def replay(self, model, x, c, routing):
            asked.append(is_capturable(model, x, c, routing))

    model.graphs = Asked()
    how = {"max_new_tokens": 4, "lookahead": 1}
    bd3lm.denoise(bridge, small.prompt_of(1, 3), **how)
    assert all(asked) and asked
    hook = [("blocks.0.hook_resid_pre", lambda x, hook: None)]
    with bridge.hooks(fwd_hooks=hook):
        bd3lm.denoise(bridge, small.prompt_of(1, 3), **how)
    assert not all(asked)
    asked.clear()
    bd3lm.denoise(bridge, small.prompt_of(1, 3), kv_cache=False, **how)
    bridge(small.prompt_of(1, 8).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        bd3lm.denoise(bridge, small.prompt_of(1, 3), **how)
    assert not any(asked) and asked


def test_without_a_gpu_the_scope_is_refused_with_the_way_out(folders):
    bridge = boot(folders["adaln"], torch.device("cpu"))
    with pytest.raises(InputError, match=r"is on cpu.*leave the scope out"):
        with bd3lm.cuda_graphs(bridge):
            pass
    with pytest.raises(InputError, match="boot it first"):
        with bd3lm.cuda_graphs("bd3lm"):
            pass


def test_the_scope_ends_after_an_exception_too(folders):
    bridge = boot(folders["adaln"], torch.device("cpu"))
    with FakeTensorMode():
        table = nn.Parameter(torch.empty(12, 16, device="cuda"))
    bridge.embed.original_component.embedding = table
    model = bridge.original_model
    with pytest.raises(KeyError), bd3lm.cuda_graphs(bridge):
        outer = model.graphs
        assert isinstance(outer, Graphs)
        with bd3lm.cuda_graphs(bridge):
            assert model.graphs is not outer
        assert model.graphs is outer
        raise KeyError
    assert model.graphs is None
